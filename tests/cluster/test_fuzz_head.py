"""A head that answers anything, as a stranger's machine may: it is not understood, in a line, or what is fit of it comes home."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from odd import changed

from capture.errors import PairscopeError
from capture.layout import RunDir
from capture.schema import SCHEMA_VERSION
from capture.show import Show
from cluster.collect import Collector
from cluster.collect_errors import StrangeHeadError, UnreachableError
from cluster.collect_follow import verdict, why_not_down
from cluster.collect_source import HeadSource, Link, Look, as_look
from cluster.shelf import PREFIX

ID = "0123456789abcdef"
FILE = {"name": "prompts.parquet", "bytes": 3, "rows": 1, "sha256": "0" * 64}
WHOLE: dict[str, Any] = {
    "sweeps": [{"out": "/root/out", "exit_code": 0, "items": [{"entry": "a", "state": "complete", "capture": ID}], "alive": False}],
    "out": "/root/out", "captures": [{"pair": "a", "capture": ID, "marker": {"schema_version": SCHEMA_VERSION, "files": [FILE]}}],
    "rows": [{"attempt": "a1", "entry": "a", "state": "failed", "started": "2025-01-01T00:00:00", "capture": ID, "error": "e"}],
    "logs": ["logs/a/a1.log"], "others": {"/root/b": [{"pair": "b", "capture": ID, "marker": {"schema_version": SCHEMA_VERSION, "files": [FILE]}}]}, "unread": {"/x": "why"}, "error": None,
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 1.5, 1e400, 10**30, "", "x", "../..", "\ud800", "a\x00b", "x" * 5000, [], [1], [None], [["a"]], {}, {"a": {"b": []}},
)  # fmt: skip


class Sending:
    """A source whose look is as given, and which sends three bytes for every file."""

    def __init__(self, look: Look) -> None:
        self.seen = look

    def look(self) -> Look:
        return self.seen

    def fetch(self, base: str, names: Any, into: Path, tick: Any) -> None:
        for name in names:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_bytes(b"abc")


def test_odd_values_anywhere_in_an_answer(tmp_path: Path) -> None:
    rng = random.Random(1)
    taken = 0
    for i in range(300):
        home = RunDir(str(tmp_path / str(i) / "home"))
        try:
            look = as_look(json.loads(json.dumps(changed(rng, WHOLE, ODD))))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # which HeadSource.look tells
        try:
            made = Collector(Sending(look), home, Show(stream=io.StringIO(), live=False))
            done = made.round()
            verdict(done, made.at_home)
            why_not_down(look, made)
        except PairscopeError:
            continue
        finally:
            assert [p.name for p in home_of(tmp_path, i)] in ([], ["home"]), "nothing lies elsewhere"
        taken += 1
    assert taken > 100


def home_of(folder: Path, i: int) -> list[Path]:
    return sorted((folder / str(i)).iterdir()) if (folder / str(i)).exists() else []


@pytest.mark.parametrize(
    "answer",
    ["{", "[]", "null", "[" * 5_000, "{}", json.dumps(WHOLE | {"unread": "x"}), json.dumps(WHOLE | {"out": 5}),
     json.dumps(WHOLE | {"others": {"/b": [5]}})],
)  # fmt: skip
def test_an_answer_that_is_none_is_said_in_a_line(tmp_path: Path, answer: str) -> None:
    ssh = tmp_path / "ssh"
    (tmp_path / "said").write_text(PREFIX + answer + "\n")
    ssh.write_text(f"#!/bin/sh\ncat '{tmp_path}/said'\n")
    ssh.chmod(0o755)
    with pytest.raises(UnreachableError, match="answered what cannot be read"):
        HeadSource(lambda: Link((str(ssh),), "root@far")).look()


@pytest.mark.parametrize("missing", ["others", "logs", "error"])
def test_an_answer_of_another_version_of_pairscope_is_told_as_such(tmp_path: Path, missing: str) -> None:
    ssh = tmp_path / "ssh"
    (tmp_path / "said").write_text(PREFIX + json.dumps({key: WHOLE[key] for key in WHOLE if key != missing}) + "\n")
    ssh.write_text(f"#!/bin/sh\ncat '{tmp_path}/said'\n")
    ssh.chmod(0o755)
    with pytest.raises(StrangeHeadError, match=f"'{missing}'.*another version.*made the cluster"):
        HeadSource(lambda: Link((str(ssh),), "root@far")).look()
