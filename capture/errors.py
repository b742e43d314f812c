"""Errors that a user can mend. Each names the thing, the file and key where there is one, and what to do.

The command line prints them in one line and exits with `exit_code`; anything else is a bug and keeps its traceback.
"""

import errno
import os

_WHY_NOT = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission",
    errno.EROFS: "read-only",
}


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


class HubFailedError(CheckpointError):
    """The hub failed in the middle of its answers; asked again it may not."""


class HubUnreachableError(CheckpointError):
    """No way to the hub from this machine; from another one there may be."""


class UnsupportedModelError(PairscopeError):
    """The architecture, or this combination of two models, cannot be compared."""


class DeviceError(PairscopeError):
    """The device asked for is not there, is not the one allowed, or is too small."""


class DeviceMemoryError(DeviceError):
    """The device ran out of memory, or a plan would not fit it."""


class DoesNotFitError(DeviceMemoryError):
    """The arithmetic says beforehand that it will not fit: trying again would say the same."""


class StoreError(PairscopeError):
    """The output cannot be written or read: no permission, no space, another schema version, a broken file."""


class SelfCheckError(PairscopeError):
    """A self-check that runs with every capture failed: the numbers would not be right, so none are written."""


def disk_is_full(error: BaseException | None) -> bool:
    """True for what the system says where there is no room to write, by disk or by quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def why_not_written(error: BaseException) -> str:
    """What kept a file from being written, in a few words; an error of ours is asked for its cause."""
    cause = error.__cause__ if isinstance(error, PairscopeError) and error.__cause__ else error
    return (_WHY_NOT.get(cause.errno or 0) if isinstance(cause, OSError) else None) or str(cause)


def cannot_write(what: str, error: OSError) -> StoreError:
    """The error for a user from what a file system said; `what` could not be written."""
    return StoreError(
        f"cannot write {what}: {why_not_written(error)}. Choose another --out, or make room and run again"
    )


def cannot_read(what: str, error: OSError) -> StoreError:
    """The same for what could not be read: by a disk, which says why by a number, or by a store, which may answer the next time."""
    if error.errno:
        return StoreError(f"cannot read {what}: {os.strerror(error.errno)}")
    return StoreError(
        f"cannot read {what}: {' '.join(str(error).split())[:300].rstrip('.')}. Try again, it goes on where it was"
    )
