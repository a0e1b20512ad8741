"""Stand-in for the one name that the supervision of processes imports from Lightning.

It needs nothing else of it, and that import would cost four seconds for each process of a test. The package is entered
past its own `__init__` for the same reason. Import this before anything of the package.
"""

import sys
import types
from pathlib import Path


class SIGTERMException(SystemExit):
    """As Lightning's."""


for name, contents in {
    "lightning_npu_tp": {"__path__": [str(Path(__file__).parents[3] / "lightning_npu_tp")]},
    "lightning": {"__path__": []},
    "lightning.pytorch": {"__path__": []},
    "lightning.pytorch.utilities": {"__path__": []},
    "lightning.pytorch.utilities.exceptions": {"SIGTERMException": SIGTERMException},
}.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
