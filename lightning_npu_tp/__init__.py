"""Train mixture-of-experts language models sharded over Ascend NPUs with PyTorch Lightning.

The public surface is the names below and four sub-packages: `callbacks` (Lightning callbacks for any module),
`optim` (optimizers for sharded parameters), `models` (what a `ModelFamily` of your own is made of) and `kernels`
(which implementation computes what). Whatever else lies in the package may change between versions.

Importing it makes `Trainer(accelerator="npu", strategy="npu_tp")` work, in either order with Lightning, and does no
more: no torch, Lightning, transformers or torch_npu is imported before a name is asked for, no device touched, no
environment variable set. Where torch_npu keeps torch from being imported, the error says what to do.
"""

from typing import TYPE_CHECKING

from lightning_npu_tp.devices.lazy_names import lazy_names
from lightning_npu_tp.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    CountMismatch,
    DataError,
    DeviceError,
    LightningNPUTPError,
    RankFailure,
    VocabularyError,
)
from lightning_npu_tp.trainer.registration import register_with_lightning

if TYPE_CHECKING:
    from lightning_npu_tp import callbacks, kernels, models, optim
    from lightning_npu_tp.devices.hccl_settings import HcclSettings
    from lightning_npu_tp.launch.sweep import run_job
    from lightning_npu_tp.models.families.family import ModelFamily
    from lightning_npu_tp.trainer.accelerator import NPUAccelerator
    from lightning_npu_tp.trainer.precision import ShardedClipping
    from lightning_npu_tp.trainer.strategy import NPUTensorParallelStrategy
    from lightning_npu_tp.weights.load import weights_from

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "CountMismatch",
    "DataError",
    "DeviceError",
    "HcclSettings",
    "LightningNPUTPError",
    "ModelFamily",
    "NPUAccelerator",
    "NPUTensorParallelStrategy",
    "RankFailure",
    "ShardedClipping",
    "VocabularyError",
    "callbacks",
    "kernels",
    "models",
    "optim",
    "run_job",
    "weights_from",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "": "callbacks kernels models optim",
        "devices.hccl_settings": "HcclSettings",
        "launch.sweep": "run_job",
        "models.families.family": "ModelFamily",
        "trainer.accelerator": "NPUAccelerator",
        "trainer.precision": "ShardedClipping",
        "trainer.strategy": "NPUTensorParallelStrategy",
        "weights.load": "weights_from",
    },
)

register_with_lightning()
