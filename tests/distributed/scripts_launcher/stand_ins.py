"""Stand-ins for the few names that the supervision of processes imports from Torch and Lightning.

It needs neither, and their imports would cost four seconds for each process of a test. The package is entered past
its own `__init__` for the same reason. Import this before anything of the package.
"""

import sys
import types
from pathlib import Path


class SIGTERMException(SystemExit):
    """As Lightning's."""


class LostPeer(RuntimeError):
    """As torch.distributed's."""


for name, contents in {
    "lightning_npu_tp": {"__path__": [str(Path(__file__).parents[3] / "lightning_npu_tp")]},
    "torch": {"__path__": []},
    "torch.distributed": {"DistError": LostPeer},
    "lightning": {"__path__": []},
    "lightning.pytorch": {"__path__": []},
    "lightning.pytorch.utilities": {"__path__": []},
    "lightning.pytorch.utilities.exceptions": {"SIGTERMException": SIGTERMException},
}.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
sys.modules["torch"].distributed = sys.modules["torch.distributed"]
