"""A head for tests of collecting: a run directory, a home, and an `ssh` that runs its command on this machine."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capture.layout import RunDir
from capture.manifest import Attempt
from capture.show import Show
from capture.stop import Stop
from capture.store import CaptureWriter, category
from cluster.collect_follow import Follow
from cluster.collect_source import HeadSource, Link, Look, StoreSource, as_look
from cluster.shelf import shelf

ROOT = Path(__file__).resolve().parents[2]
ID = "0123456789abcdef"  # of a capture

# Leaves out ssh's options and the target; counts what comes back, and cuts the line after as many bytes as the file `cut` says.
SSH = f"""#!{sys.executable}
import os, subprocess, sys
folder = os.path.dirname(os.path.abspath(__file__))
words = sys.argv[1:]
while words and words[0] not in ("root@far", "far"):
    words.pop(0)
command = " ".join(words[1:])
with open(folder + "/calls", "a") as calls:
    calls.write(("rsync" if "rsync" in command else "look") + "\\n")
if os.path.exists(folder + "/down"):
    sys.exit("ssh: connect to host far port 22: No route to host")
cut = int(open(folder + "/cut").read()) if "rsync" in command and os.path.exists(folder + "/cut") else None
env = {{"PATH": os.environ["PATH"], "HOME": folder + "/home", "PYTHONPATH": {str(ROOT)!r}}}
process = subprocess.Popen(["bash", "-c", command], stdin=0, stdout=subprocess.PIPE, env=env)
sent = 0
os.set_blocking(1, True)  # rsync gives a pipe that is not
while True:
    data = os.read(process.stdout.fileno(), 65536)
    if cut is not None and sent + len(data) > cut:
        os.remove(folder + "/cut")
        process.kill()
        sys.exit(255)
    if not data:
        break
    sent += len(data)
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
with open(folder + "/bytes", "a") as count:
    count.write(str(sent) + "\\n")
sys.exit(process.wait())
"""


class Far:
    """The machine over there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir(parents=True)
        (folder / "home" / ".bashrc").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
        self.ssh = folder / "ssh"
        self.ssh.write_text(SSH)
        self.ssh.chmod(self.ssh.stat().st_mode | stat.S_IXUSR)
        self.run = RunDir(str(folder / "home" / "out"))

    def reach(self) -> Link:
        return Link((str(self.ssh),), "root@far")

    def near(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave the line out: what the head would answer and send comes from this process, at once."""

        def look(source: HeadSource) -> Look:
            self._note("look")
            return as_look(json.loads(json.dumps(shelf(source.out))))

        def fetch(source: HeadSource, *what: Any) -> None:
            self._note("rsync")
            StoreSource(f"file://{source.out}", None).fetch(*what)

        monkeypatch.setenv("PAIRSCOPE_HOME", str(self.folder / "home" / ".pairscope"))
        monkeypatch.setattr(HeadSource, "look", look)
        monkeypatch.setattr(HeadSource, "fetch", fetch)

    def _note(self, kind: str) -> None:
        with open(self.folder / "calls", "a") as calls:
            calls.write(f"{kind}\n")

    def calls(self, kind: str) -> int:
        path = self.folder / "calls"
        return path.read_text().split().count(kind) if path.exists() else 0

    def last_bytes(self) -> int:
        return int((self.folder / "bytes").read_text().split()[-1])

    def cut_after(self, count: int) -> None:
        (self.folder / "cut").write_text(str(count))

    def down(self, is_down: bool = True) -> None:
        if is_down:
            (self.folder / "down").touch()
        else:
            (self.folder / "down").unlink()

    def capture(self, pair: str, capture: str = ID, rows: int = 50, seed: int = 0) -> Path:
        """A complete capture of one table whose texts do not compress, with its attempt and log."""
        attempt = Attempt(self.run, pair)
        attempt.start(capture=capture)
        writer = CaptureWriter(self.run, pair, capture)
        writer.table("prompts", [_prompts(pair, capture, rows, seed)])
        writer.finish({"pair": pair})
        self.run.write_bytes(attempt.log_path, f"the log of {attempt.id}\n".encode())
        attempt.finish("complete", n_prompts=rows, dollars=0.25)
        return Path(self.run.capture_path(pair, capture))

    def failed(self, entry: str) -> None:
        attempt = Attempt(self.run, entry)
        attempt.finish("failed", ValueError("it is broken"))

    def note(
        self,
        *items: tuple[str, str, str | None],
        exit_code: int | None = 0,
        alive: bool = False,
        out: str = "",
        n: int = 0,
        beside: tuple[int, ...] = (),
    ) -> None:
        """A sweep's word on itself; items: (entry, state, capture). beside: the n of those that ran when it began."""
        place = self.folder / "home" / ".pairscope" / "sweeps"
        place.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "out": out or self.run.root, "entries": [i[0] for i in items], "started": "2026-01-01T00:00:00.000",
            "ended": None if alive or exit_code is None else "2026-01-01T01:00:00.000", "exit_code": None if alive else exit_code,
            "items": [{"entry": e, "state": s, "capture": c} for e, s, c in items],
            "pid": os.getpid(), "born": f"0{n}", "beside": [[os.getpid(), f"0{other}"] for other in beside],
        }  # fmt: skip
        if alive:
            content["born"] = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        (place / f"2026-{n}.json").write_text(json.dumps(content))


class Collecting:
    """One call of collect without its command line; `said` and `down` tell what it did."""

    def __init__(
        self,
        far: Far,
        home: Path,
        *,
        once: bool = True,
        teardown: bool = False,
        every: float = 0.05,
        remote_out: str | None = None,
    ) -> None:
        self.down = 0
        self.stream = io.StringIO()
        self.follow = Follow(
            HeadSource(far.reach), remote_out, RunDir(str(home)), Show(stream=self.stream, live=False), Stop(), every=every, once=once,
            tear_down=self.tear_down if teardown else None,
        )  # fmt: skip

    def tear_down(self) -> int:
        self.down += 1
        return 0

    def __call__(self) -> int:
        return self.follow.run()

    @property
    def said(self) -> str:
        return self.stream.getvalue()


def _prompts(pair: str, capture: str, rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "pair": category(np.zeros(rows, int), [pair]), "capture": category(np.zeros(rows, int), [capture]),
        "prompt_idx": np.arange(rows), "variant": category(np.zeros(rows, int), ["identity"]),
        "text": [rng.bytes(500).hex() for _ in range(rows)], "n_tokens": np.full(rows, 3), "n_tokens_before_trimming": np.full(rows, 3),
    }  # fmt: skip
