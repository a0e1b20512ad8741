"""What went wrong and what to do about it.

Every error that a user can cause names the setting, its value, what it conflicts with and the
repair. The classes also derive from the built-in that a caller would expect, so that
`except ValueError` keeps working. This module imports nothing.
"""


class LightningNPUTPError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(LightningNPUTPError, ValueError):
    """A setting, or two settings together, that cannot work."""


class DeviceError(LightningNPUTPError, RuntimeError):
    """The accelerator that was asked for cannot be used on this machine."""


class ConversionError(LightningNPUTPError, ValueError):
    """A model that cannot be turned into a sharded one; names the module or parameter."""


class CheckpointError(LightningNPUTPError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class DataError(LightningNPUTPError, ValueError):
    """Training data that is missing, empty, unreadable or does not fit the model."""


class VocabularyError(DataError, IndexError):
    """A token id or a label that the model's vocabulary does not have."""


class CountMismatch(LightningNPUTPError, ValueError):
    """Row counts handed to a collective do not add up; raised before any communication."""


class RankFailure(LightningNPUTPError, RuntimeError):
    """Another rank of this run died; carries that rank's own traceback."""
