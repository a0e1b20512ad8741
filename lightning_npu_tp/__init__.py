"""Train mixture-of-experts language models sharded over Ascend NPUs with PyTorch Lightning.

Importing this package registers the accelerator "npu" and the strategy "npu_tp" with Lightning. It
touches no device, sets no environment variable and does not ask for torch_npu itself; torch and
transformers import it where it is installed, and where that fails the error says what to do.
"""

from lightning_npu_tp.devices.device import explained_import
from lightning_npu_tp.errors import DeviceError

__all__ = ["ModelFamily", "NPUAccelerator", "NPUTensorParallelStrategy", "weights_from"]

_problem: DeviceError | None = None
try:
    with explained_import():
        from lightning_npu_tp.models.families.family import ModelFamily
        from lightning_npu_tp.trainer.accelerator import NPUAccelerator, register
        from lightning_npu_tp.trainer.strategy import NPUTensorParallelStrategy, register_strategy
        from lightning_npu_tp.weights.load import weights_from
    register()
    register_strategy()
except DeviceError as error:
    # `lightning-npu-tp doctor` must come up and say what is wrong; whoever asks for a name is told here.
    _problem = error


def __getattr__(name: str) -> object:
    if _problem is not None and name in __all__:
        raise _problem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
