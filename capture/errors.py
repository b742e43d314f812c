"""Errors that a user can mend. Each names the thing, the file and key where there is one, and what to do.

The command line prints them in one line and exits with `exit_code`; anything else is a bug and keeps its traceback.
"""


class PairscopeError(Exception):
    """Base of all errors meant for a user."""

    exit_code = 1


class ConfigError(PairscopeError):
    """The call or the config is wrong; nothing was started."""

    exit_code = 2


class PromptError(ConfigError):
    """No prompts, a prompt of zero tokens, or token ids that one model lacks."""


class CheckpointError(PairscopeError):
    """A checkpoint is missing, corrupt, gated, in the wrong format, or lacks weights."""


class UnsupportedModelError(PairscopeError):
    """The architecture, or this combination of two models, cannot be compared."""


class DeviceError(PairscopeError):
    """The device asked for is not there, is not the one allowed, or is too small."""


class DeviceMemoryError(DeviceError):
    """The device ran out of memory, or a plan would not fit it."""


class StoreError(PairscopeError):
    """The output cannot be written or read: no permission, no space, another schema version, a broken file."""


class SelfCheckError(PairscopeError):
    """A self-check that runs with every capture failed: the numbers would not be right, so none are written."""
