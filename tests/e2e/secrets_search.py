"""Look for planted secrets wherever a run leaves text: files, processes' arguments, a fake market's rows, what was printed.

planted = Planted()
environment = os.environ | planted.environment
...                                        # a sweep, a rehearsal
assert planted.found(folders=[out, home], texts={"stdout": said, "rows": json.dumps(rows)}) == []
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

VARIABLES = (
    "VAST_API_KEY", "VAST_HEAD_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "GOOGLE_API_KEY", "WANDB_API_KEY",
)  # fmt: skip
PIECE = 1 << 22


@dataclass
class Planted:
    """A secret for each variable, like no other text. environment: to be set for what is looked at."""

    environment: dict[str, str] = field(
        default_factory=lambda: {name: f"planted{secrets.token_hex(12)}" for name in VARIABLES}
    )

    def add(self, name: str, value: str) -> None:
        """One more: what was read from a token file, say."""
        self.environment[name] = value

    def found(
        self, folders: Iterable[Path] = (), texts: Mapping[str, str] | None = None, allowed: Iterable[Path] = ()
    ) -> list[str]:
        """Every place that holds a secret, as `VARIABLE in PLACE`. allowed: the files whose task is to hold one."""
        places = [hit for name, text in (texts or {}).items() for hit in self._in(text.encode(errors="replace"), name)]
        kept = {Path(p).resolve() for p in allowed}
        for folder in folders:
            for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.resolve() not in kept):
                places += self._in(str(path).encode(), f"the name {path}")
                places += self._in_file(path)
        return places + self.in_arguments()

    def in_arguments(self) -> list[str]:
        """Of all processes of this machine that can be seen: anyone may read those."""
        places = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                places += self._in(path.read_bytes(), str(path))
            except OSError:
                continue  # it has ended
        return places

    @contextmanager
    def watched(self, every: float = 0.5) -> Iterator[list[str]]:
        """While the block runs, what `in_arguments` finds comes into the list: processes that start and end meanwhile count."""
        seen: list[str] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(every):
                seen.extend(self.in_arguments())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield seen
        finally:
            ended.set()
            watcher.join()

    def _in(self, data: bytes, place: str) -> list[str]:
        return [f"{name} in {place}" for name, value in list(self.environment.items()) if value.encode() in data]

    def _in_file(self, path: Path) -> list[str]:
        found: set[str] = set()
        tail = b""
        try:
            with path.open("rb") as stream:
                while block := stream.read(PIECE):
                    found |= set(self._in(tail + block, str(path)))
                    tail = block[-200:]
        except OSError:
            return []
        return sorted(found)


def modes(folder: Path, secret_names: Iterable[str]) -> list[str]:
    """Files of these names below a folder that others than their owner can read."""
    wrong = []
    for path in sorted(folder.rglob("*")):
        if path.name in set(secret_names) and path.is_file() and os.stat(path).st_mode & 0o077:
            wrong.append(f"{path} has mode {os.stat(path).st_mode & 0o777:o}")
    return wrong
