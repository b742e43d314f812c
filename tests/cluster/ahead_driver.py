"""Sweeps over a hub on loopback, in a process with a Ray of its own: `python ahead_driver.py FOLDER NODES SCENARIO...`

NODES: 1, or 2 nodes with a cache each. Prints one JSON object a scenario, with what it saw. What computes is tests/cluster/
ahead_work.py: it waits for a file that this driver writes once what the entry waits for has come about, so that nothing here
depends on time.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "e2e"))
# for the workers
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_raylet_start_wait_time_s"] = "180"  # noqa: SIM112  Ray spells it so; on a busy machine

from local_hub import Fault, LocalHub  # noqa: E402

SIZE = 3 << 20  # bytes of a model's weights


def make_models(root: Path, names: str) -> None:
    """org/<name>-base and org/<name>-sft for each letter: files of the right form, weights that nobody can compute with."""
    for name in [f"{letter}-{kind}" for letter in names for kind in ("base", "sft")]:
        folder = root / "org" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(header() + os.urandom(SIZE))
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "tokenizer_config.json").write_text("{}")


def header() -> bytes:
    text = json.dumps({"w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    return len(text).to_bytes(8, "little") + text


class Stage:
    """One sweep at a time over the hub. go(name, when): let an entry's computing end once `when()` is true."""

    def __init__(self, folder: Path, hub: LocalHub, caches: list[Path]) -> None:
        self.folder, self.hub, self.caches = folder, hub, caches
        self.waiting: dict[Path, Callable[[], Any]] = {}
        self.said = io.StringIO()
        self.most = 0

    def entry(self, name: str, when: Callable[[], Any] | None = None, **fields: Any) -> Any:
        from capture.config import Entry

        self.letters += name
        flag = self.out / f"go-{name}"
        if when is not None:
            self.waiting[flag] = when
        return Entry.model_validate(
            {"name": name, "base_model": f"org/{name[0]}-base", "sft_model": f"org/{name[0]}-sft", "prompts": ("a",),
             "tokenizer": f"org/{name[0]}-base", "device": "cpu", "weights": "download",
             "notes": None if when is None else str(flag)} | fields
        )  # fmt: skip

    @property
    def out(self) -> Path:
        return self.folder / self.scenario

    def begin(self, scenario: str) -> None:
        self.letters = ""
        self.scenario, self.said, self.most = scenario, io.StringIO(), 0
        self.out.mkdir()
        self.hub.requests.clear()

    def has(self, name: str, cache: Path | None = None) -> bool:
        """Whether both models of a pair are whole in a cache (in any)."""
        from ahead_work import whole

        pair = {f"org/{name}-base", f"org/{name}-sft"}
        return any(pair <= set(whole(c)) for c in ([cache] if cache else self.caches))

    def told(self, text: str) -> bool:
        return text in self.said.getvalue()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                self.most = max(self.most, *(self.held(c) for c in self.caches))
                for flag, when in list(self.waiting.items()):
                    if when():
                        flag.touch()
                        del self.waiting[flag]

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.waiting.clear()

    def held(self, cache: Path) -> int:
        """Bytes on disk of the sweep's models' files, those that are not whole too."""
        total = 0
        for path in cache.glob(f"models--org--[{self.letters}]-*/blobs/*"):
            with contextlib.suppress(OSError):
                total += min(path.stat().st_size, path.stat().st_blocks * 512)
        return total

    def sweep(self, *entries: Any, jobs: int | None = 1) -> dict[str, Any]:
        from capture.layout import RunDir
        from capture.show import Show
        from cluster import sweep

        sweep.WORK = "ahead_work:work"  # so that the sweep knows that its work reads from the hub
        with self.watching():
            summary = sweep.run_sweep(
                [(e.name, e) for e in entries], str(self.out), jobs=jobs, work="ahead_work:work",
                resolve="fake_work:resolve", show=Show(stream=self.said, live=False, every=0.0),
            )  # fmt: skip
        content = self.hub.seen("content")
        rows = {r["entry"]: r for r in RunDir(str(self.out)).manifest_rows()}
        return {
            "states": {i.name: i.state for i in summary.items},
            "errors": {i.name: i.row.get("error") for i in summary.items},
            "said": self.said.getvalue(),
            "notes": {p.stem: json.loads(p.read_text()) for p in (self.out / "notes").glob("*.json")},
            "bytes": {repo: sum(r.range[1] - r.range[0] + 1 for r in content if r.range and repo in r.path)
                      for repo in sorted({"/".join(r.path.strip("/").split("/")[:2]) for r in content})},
            "logs": {name: (self.out / row["log"]).read_text() for name, row in rows.items()},
            "most": self.most, "file": len(header()) + SIZE,
        }  # fmt: skip


def failing(stage: Stage) -> dict[str, Any]:
    """The second is not on the hub; of the third other bytes come than the hub's, the first time."""
    stage.hub.faults.append(Fault("wrong", part="e-sft", times=1))
    return stage.sweep(
        stage.entry("d", lambda: stage.told("x: not fetched ahead")),
        stage.entry("x"),
        stage.entry("f", lambda: stage.told("e: not fetched ahead")),
        stage.entry("e"),
    )  # fmt: skip


def bounded(stage: Stage) -> dict[str, Any]:
    """Four pairs, and a cache for two and a half."""
    bound = int(2.5 * 2 * SIZE)
    letters = "ghij"
    entries = [
        stage.entry(
            one, (lambda following=following: stage.has(following)) if following else None, cache_gib=bound / (1 << 30)
        )
        for one, following in zip(letters, [*letters[1:], None], strict=True)
    ]
    return stage.sweep(*entries) | {"bound": bound, "pair": 2 * SIZE}


def alone(stage: Stage) -> dict[str, Any]:
    """The same, and each computes only a moment: with fetch_ahead off nothing comes before its turn."""
    return stage.sweep(*(stage.entry(one, lambda: True, fetch_ahead=False) for one in "kl"))


def stopped(stage: Stage) -> dict[str, Any]:
    """Stopped while the second's files come, slowly; then again, and the second's files come as they should."""

    def part_there() -> bool:
        if stage.held(stage.caches[0]) < 2 * SIZE + (1 << 20) or not stage.told("n: fetching ahead"):
            return False
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return False

    sent: list[bool] = []
    stage.hub.bucket.rate = 1.5e6
    first = stage.sweep(stage.entry("m", part_there), stage.entry("n"))
    end = time.monotonic() + 60
    while (left := fetching()) and time.monotonic() < end:  # Ray was asked to end it, and does so in its own time
        time.sleep(0.1)
    stage.hub.bucket.rate = None
    stage.hub.requests.clear()
    again = stage.sweep(stage.entry("m", lambda: stage.has("n")), stage.entry("n"))
    return {"first": first, "left": left, "again": again}


def apart(stage: Stage) -> dict[str, Any]:
    """Two nodes: two entries compute until the two behind them are there, each at one of the nodes."""

    def both() -> bool:
        return any(stage.has("q", a) and stage.has("r", b) for a, b in (stage.caches, reversed(stage.caches)))

    return stage.sweep(
        stage.entry("o", both), stage.entry("p", both), stage.entry("q", lambda: stage.told("r: complete")), stage.entry("r"),
        jobs=None,
    )  # fmt: skip


def fetching() -> list[str]:
    """Processes that fetch ahead for this hub."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            mine = process.name.isdigit() and b"Fetching" in (process / "cmdline").read_bytes()
            if mine and os.environ["HF_ENDPOINT"].encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def main(folder: str, nodes: str, *scenarios: str) -> None:
    work = Path(folder)
    make_models(work / "hub", "abcdefghijklmnopqr")
    caches = [work / f"node{i}" / "hub" for i in range(int(nodes))]
    with LocalHub(work / "hub") as hub, contextlib.ExitStack() as stack:
        os.environ |= hub.environment(work / "node0")
        import ray

        store = 80 * 1024**2
        if len(caches) > 1:
            from ray.cluster_utils import Cluster

            cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
            )
            stack.callback(cluster.shutdown)
            for cache in caches:
                cluster.add_node(num_cpus=1, object_store_memory=store, env_vars={"HF_HUB_CACHE": str(cache)})
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address="local", num_cpus=1, object_store_memory=store, include_dashboard=False, log_to_driver=False,
                     logging_level=logging.ERROR)  # fmt: skip
        stack.callback(ray.shutdown)
        stage = Stage(work, hub, caches)
        for name in scenarios:
            stage.begin(name)
            began = time.monotonic()
            found = globals()[name](stage) | {"scenario": name, "seconds": round(time.monotonic() - began, 1)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
