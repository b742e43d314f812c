"""What can go wrong between home and a cluster, by what collecting does about it."""

from __future__ import annotations

from capture.errors import PairscopeError


class UnreachableError(PairscopeError):
    """No connection, or one that broke: tried again after a pause."""


class StrangeHeadError(UnreachableError):
    """The head answers, and of another version than is understood here: some more tries, then it is the user's."""


class ClusterGoneError(PairscopeError):
    """The cluster has no head any more: nothing else will come from there."""


class DamagedError(PairscopeError):
    """What arrived is not what its marker says, twice."""
