"""Where results are fetched from: the head's disk through ssh and rsync, or an object store that needs no head."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from capture.errors import ConfigError, StoreError, cannot_write
from capture.layout import RunDir
from cluster.collect_errors import StrangeHeadError, UnreachableError
from cluster.shelf import PREFIX, logs

Tick = Callable[[], None]  # called several times a second while something is fetched; may raise to end it

LOOK_TIMEOUT_S = 90.0
SILENCE_S = 60  # rsync gives up a transfer in which nothing moved for so long
CHUNK = 1 << 20
ON_HEAD = "source ~/.bashrc; cd ~/pairscope 2>/dev/null; python3 -m cluster.shelf"
REFUSALS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "NO_SUCH_BUCKET",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)
RSYNC_NO_SPACE, RSYNC_SOME_MISSING = 11, (23, 24)


@dataclass(frozen=True)
class Found:
    """A complete capture over there. marker: as it was sent, not yet to be trusted."""

    pair: str
    capture: str
    marker: dict[str, Any]

    @property
    def base(self) -> str:
        return f"captures/pair={self.pair}/capture={self.capture}"


@dataclass(frozen=True)
class Look:
    """What there is now. out: the run directory over there. sweeps: the notes of cluster/note.py, oldest first. rows: of the
    manifest. logs: paths below `out`. others: run directories of other sweeps and the captures that are complete in each.
    unread: what else lies there and cannot be read, with the reason. error: why `out` cannot be read."""

    out: str | None
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    captures: list[Found] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    others: dict[str, list[Found]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    error: str | None = None


class Source(Protocol):
    def look(self) -> Look:
        """What there is. Raises UnreachableError and ClusterGoneError."""

    def fetch(self, base: str, names: Sequence[str], into: Path, tick: Tick) -> None:
        """Bring files of a directory below the run directory; what an earlier try left in `into` is gone on with.

        A file that is not there is left out. Raises UnreachableError and StoreError.
        """


@dataclass(frozen=True)
class Link:
    """A way to a machine. ssh: the program with its options, as a shell would be called through it; target: user@host."""

    ssh: tuple[str, ...]
    target: str


class HeadSource:
    """The head's disk. reach: the way to the head, looked up again for every use. out: None looks at the last sweep's, and only
    looks."""

    def __init__(self, reach: Callable[[], Link], out: str | None = None) -> None:
        self.reach, self.out = reach, out

    def look(self) -> Look:
        link = self.reach()
        command = f"{ON_HEAD} {shlex.quote(self.out)}" if self.out else ON_HEAD
        # as Ray's own commands are started: set-up puts Python on the path there
        remote = f"bash --login -i -c {shlex.quote(command)}"
        try:
            done = subprocess.run(
                [*link.ssh, link.target, remote], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=LOOK_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"the head at {link.target} did not answer for {LOOK_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise ConfigError(f"cannot start ssh: {error}; install the ssh client (openssh-client)") from error
        line = next((x for x in done.stdout.splitlines() if x.startswith(PREFIX)), None)
        if line is None:
            raise UnreachableError(f"no answer from the head at {link.target}: {_lines(done.stderr)[-1]}")
        try:
            answer = json.loads(line.removeprefix(PREFIX))
        except (ValueError, RecursionError) as error:
            raise UnreachableError(f"the head at {link.target} answered what cannot be read: {error}") from error
        try:
            return as_look(answer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StrangeHeadError(
                f"the head at {link.target} answered what cannot be read ({type(error).__name__}: {error}): its pairscope is of another "
                "version, it seems; collect with the one that made the cluster"
            ) from error

    def fetch(self, base: str, names: Sequence[str], into: Path, tick: Tick) -> None:
        assert self.out is not None
        link = self.reach()
        remote = f"{self.out}/{base}/".replace("//", "/")
        secluded = [] if shlex.quote(remote) == remote else ["-s"]
        with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile("w", prefix="pairscope-") as listed:
            listed.write("".join(f"{name}\n" for name in names))
            listed.flush()
            # --inplace: what was fetched before a break is there to go on with, however this ends
            command = ["rsync", "-t", "--inplace", "--partial", f"--timeout={SILENCE_S}", f"--files-from={listed.name}", *secluded,
                       "-e", shlex.join(link.ssh), f"{link.target}:{remote}", f"{into}/"]  # fmt: skip
            code = _watch(command, said, tick)
            said.seek(0)
            text = said.read().decode(errors="replace")
        if code == RSYNC_NO_SPACE or "No space left" in text:
            raise StoreError(f"cannot write to '{into}': {_lines(text)[0]}; make room and run again, it goes on")
        if code != 0 and code not in RSYNC_SOME_MISSING:
            raise UnreachableError(f"fetching from {link.target} broke off: {_lines(text)[0]}")


def as_look(found: dict[str, Any]) -> Look:
    """What cluster/shelf.py said on the head. Raises ValueError, KeyError, TypeError, AttributeError where it is something else."""
    captures = _captures(found["captures"])
    rows, sweeps = ([r for r in found[key] if isinstance(r, dict)] for key in ("rows", "sweeps"))
    names = [str(name) for name in found["logs"]]
    others = {out: _captures(some) for out, some in found["others"].items()}
    unread = {str(k): str(v) for k, v in found["unread"].items()} if "unread" in found else {}
    out, error = found["out"], found["error"]
    if not isinstance(out, str | None) or not isinstance(error, str | None):
        raise TypeError("'out' or 'error' is no text")
    return Look(out, sweeps, captures, rows, names, others, unread, error)


def _captures(found: list[dict[str, Any]]) -> list[Found]:
    return [Found(c["pair"], c["capture"], c["marker"]) for c in found]


class StoreSource:
    """An object store, or any place that pyarrow opens. head: who knows of the sweeps; None where there is no cluster to ask."""

    def __init__(self, uri: str, head: HeadSource | None) -> None:
        self.run, self.head = RunDir(uri), head

    def look(self) -> Look:
        asked = self.head.look() if self.head is not None else Look(self.run.out)
        try:
            captures = [Found(c.pair, c.capture, c.marker) for c in self.run.captures()]
            rows, names = self.run.manifest_rows(), logs(self.run)
        except (OSError, StoreError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):  # such as one of another schema version
                raise
            raise _refused_or_away(f"cannot read '{self.run.out}'", cause) from error
        others, unread = dict(asked.others), dict(asked.unread)
        if asked.out not in (None, self.run.out):  # the last sweep's, on the head's disk
            others[asked.out] = asked.captures
            unread |= {asked.out: asked.error} if asked.error else {}
        return Look(self.run.out, asked.sweeps, captures, rows, names, others, unread)

    def fetch(self, base: str, names: Sequence[str], into: Path, tick: Tick) -> None:
        for name in names:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # the run directory itself is `.`, which a store would take for a part of the name
            path = "/".join(part for part in (self.run.root, base, name) if part != ".").replace("//", "/")
            try:
                self._copy(path, target, tick)
            except FileNotFoundError:
                continue
            except _WriteError as error:
                raise cannot_write(f"'{target}'", error.cause) from error.cause
            except OSError as error:
                raise _refused_or_away(f"fetching '{path}' broke off", error) from error

    def _copy(self, path: str, target: Path, tick: Tick) -> None:
        with self.run.fs.open_input_file(path) as source, open(target, "ab", buffering=0) as sink:
            size = source.size()
            have = sink.tell()
            if have > size:
                sink.truncate(have := 0)
            source.seek(have)
            while have < size:
                tick()
                data = source.read(CHUNK)
                if not data:
                    raise OSError(f"it ended after {have} of {size} bytes")
                rest = memoryview(data)
                # without a buffer: what is left in one fails when it is closed, and is no failure of the store
                try:
                    while rest:
                        rest = rest[sink.write(rest) :]
                except OSError as error:
                    raise _WriteError(error) from error
                have += len(data)


def _refused_or_away(what: str, error: OSError) -> StoreError | UnreachableError:
    """The error for what a store said: where it says no, asking again does not help."""
    text = " ".join(str(error).split())[:300]
    if any(word in text for word in REFUSALS):
        return StoreError(
            f"{what}: {text}; give this machine credentials that may read there, such as AWS_ACCESS_KEY_ID"
        )
    return UnreachableError(f"{what}: {text}")


class _WriteError(Exception):
    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _watch(command: list[str], said: Any, tick: Tick) -> int:
    """Run a command to its end, or until `tick` raises: then it is ended first."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    except OSError as error:
        raise ConfigError(f"cannot start rsync: {error}; install it, here and on the nodes") from error
    try:
        while True:
            tick()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.2)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _lines(text: str) -> list[str]:
    """What a program said, without what a shell always says that has no terminal; never empty."""
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip() and "job control" not in line]
    return [line for line in lines if not line.startswith("bash: cannot set terminal")] or ["not a word"]
