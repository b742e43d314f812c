"""What can go wrong between us and Vast, by what the caller has to do about it."""

from __future__ import annotations

from capture.errors import ConfigError, PairscopeError


class VastError(PairscopeError):
    """Something about Vast failed; see the subclasses."""


class VastKeyError(VastError):
    """No key, a wrong key, or one without the right that the call needs. Asking again does not help."""

    exit_code = 2


class VastBusyError(VastError):
    """Too many requests, a server error, no reply or a reply that makes no sense, also after our retries.

    done: whether the call may have been carried out all the same. Nothing is known about any machine after this error: it
    never means that a machine is gone.
    """

    def __init__(self, message: str, *, done: bool = True) -> None:
        super().__init__(message)
        self.done = done


class VastRefusedError(VastError):
    """Vast understood the call and declined it: an offer that is taken, an instance that is not there."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoOfferError(VastError):
    """Nothing on the market fits what the node type asks for."""


class GoneError(VastError):
    """An instance that was there is not any more."""


class NotGoneError(VastError):
    """An instance that was destroyed is still there. It bills; look at it."""


class HeadError(VastError):
    """The cluster's head is not in a state in which `ray up` can go on; nothing was changed."""


class VersionError(ConfigError):
    """Python, Ray or a package differs where all machines of a cluster must have the same."""


class CapError(ConfigError):
    """Renting would cross one of the limits of the provider block. Nothing was rented."""
