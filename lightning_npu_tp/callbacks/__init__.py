"""Lightning callbacks that work with any LightningModule and strategy.

throughput.py         TokensPerSecond       logs train/tokens_per_second
progress.py           TrainingProgressBar   loss, tokens/s, learning rate; lines without a terminal
loss_curve.py         LossCurve             a PNG of the losses at the end
loss_free_balance.py  LossFreeBalance       moves the routers' selection bias after each optimizer step
expert_load.py        ExpertLoadMonitor     logs expert_load/…, a PNG of tokens per expert and layer
nonfinite.py          NonFiniteGuard        refuses steps with a NaN or infinite loss or gradient
export_at_end.py      ExportAtEnd           the trained model as a Hugging Face folder
warmup.py             Warmup                communicators and operators made before step 0
"""

from lightning_npu_tp.callbacks.expert_load import ExpertLoadMonitor
from lightning_npu_tp.callbacks.export_at_end import ExportAtEnd
from lightning_npu_tp.callbacks.loss_curve import LossCurve
from lightning_npu_tp.callbacks.loss_free_balance import LossFreeBalance
from lightning_npu_tp.callbacks.nonfinite import NonFiniteGuard
from lightning_npu_tp.callbacks.progress import TrainingProgressBar
from lightning_npu_tp.callbacks.throughput import TokensPerSecond
from lightning_npu_tp.callbacks.warmup import Warmup

__all__ = [
    "ExpertLoadMonitor",
    "ExportAtEnd",
    "LossCurve",
    "LossFreeBalance",
    "NonFiniteGuard",
    "TokensPerSecond",
    "TrainingProgressBar",
    "Warmup",
]
