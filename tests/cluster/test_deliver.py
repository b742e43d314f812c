"""Results on the head's disk that other nodes made: whole or not there, and inside the run directory only."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from pyarrow import fs

from capture.layout import RunDir
from cluster import deliver, deliver_fs
from cluster.collect_check import wrong_files
from cluster.deliver import Desk

ROOT = Path(__file__).resolve().parents[2]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_a_file_is_there_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path))
    path = f"{tmp_path}/captures/pair=a/x.parquet"
    token = desk.begin(path)
    desk.append(token, 0, b"one ")
    desk.append(token, 4, b"two")
    assert desk.listing(str(tmp_path / "captures" / "pair=a"), False) == []
    assert desk.info([path])[0][1] == "none"
    desk.finish(token, 7, sha(b"one two"))
    assert names(tmp_path) == ["captures/pair=a/x.parquet"]
    assert desk.read(path, 4, 99) == b"two"


def test_a_run_directory_may_be_told_by_way_of_its_parents(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    run = RunDir(f"{tmp_path}/here/../out")
    desk = Desk(run.root)
    token = desk.begin(f"{run.root}/captures/x")
    desk.append(token, 0, b"one")
    desk.finish(token, 3, sha(b"one"))
    assert names(tmp_path / "out") == ["captures/x"]
    for outside in ("..", "../out2/x", "captures/../../x"):
        with pytest.raises(PermissionError, match="not in the run directory"):
            desk.begin(f"{run.root}/{outside}")


@pytest.mark.parametrize(("size", "digest"), [(8, sha(b"one two")), (7, sha(b"one twx"))])
def test_what_is_not_what_was_sent_is_not_kept(tmp_path: Path, size: int, digest: str) -> None:
    desk = Desk(str(tmp_path))
    token = desk.begin(f"{tmp_path}/x")
    desk.append(token, 0, b"one two")
    with pytest.raises(OSError, match="7 of"):
        desk.finish(token, size, digest)
    assert names(tmp_path) == []


def test_a_gap_is_refused_and_what_is_there_already_is_not_written_twice(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path))
    token = desk.begin(f"{tmp_path}/x")
    desk.append(token, 0, b"one")
    with pytest.raises(OSError, match="a chunk for byte 4 came at byte 3"):
        desk.append(token, 4, b"two")
    desk.append(token, 3, b"two")
    desk.append(token, 0, b"one")
    desk.append(token, 3, b"two")
    for _ in range(2):
        desk.finish(token, 6, sha(b"onetwo"))
    assert (tmp_path / "x").read_bytes() == b"onetwo"


class BadLine:
    """A desk behind a line that loses every now and then a call on its way there or the answer on its way back."""

    def __init__(self, desk: Desk, loss: float, seed: int) -> None:
        self.desk, self.loss, self.random = desk, loss, random.Random(seed)
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Any:
            there, back = self.random.random() < self.loss, self.random.random() < self.loss
            self.lost += there or back
            try:
                value = None if there else getattr(self.desk, name)(*args)
            except OSError as error:
                value = error
            return (there or back, value)

        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize("seed", range(20))
def test_a_line_that_is_cut_again_and_again_delivers_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def get(ref: Any) -> Any:
        lost, value = ref
        if lost:
            raise ray.exceptions.ActorUnavailableError("cut", None)
        if isinstance(value, OSError):
            raise value
        return value

    monkeypatch.setattr(deliver_fs.ray, "get", get)
    monkeypatch.setattr(deliver_fs, "CHUNK", 1000)
    monkeypatch.setattr(deliver_fs, "AGAIN_S", 0.0)
    line = BadLine(Desk(str(tmp_path)), 0.3, seed)
    run = RunDir(str(tmp_path))
    run.fs = fs.PyFileSystem(deliver_fs.DeskFiles(line))
    data = random.Random(seed).randbytes(20_500)
    run.write_bytes(f"{tmp_path}/a/x.parquet", data)
    assert line.lost > 3
    assert run.read_bytes(f"{tmp_path}/a/x.parquet") == data
    assert [i.base_name for i in run.list_dir(f"{tmp_path}/a")] == ["x.parquet"]
    run.fs.delete_file(f"{tmp_path}/a/x.parquet")
    assert not run.exists(f"{tmp_path}/a/x.parquet")


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/../x", "{root}/a/../../x", "relative", "{root}x"])
def test_nothing_outside_the_run_directory_is_read_or_written(tmp_path: Path, path: str) -> None:
    root = tmp_path / "run"
    desk = Desk(str(root))
    path = path.format(root=root)
    for call in (desk.begin, desk.create_dir, desk.delete_dir, desk.delete_file, lambda p: desk.read(p, 0, 1),
                 lambda p: desk.info([p]), lambda p: desk.listing(p, False)):  # fmt: skip
        with pytest.raises(PermissionError, match="is not in the run directory"):
            call(path)


def test_nothing_is_written_or_deleted_through_a_link(tmp_path: Path) -> None:
    there, pair = tmp_path / "elsewhere", tmp_path / "run" / "captures" / "pair=a"
    (there / "spans").mkdir(parents=True)
    (there / "x.parquet").write_text("mine")
    pair.parent.mkdir(parents=True)
    pair.symlink_to(there)
    desk = Desk(str(tmp_path / "run"))
    for call, name in (
        (desk.begin, "x.parquet"),
        (desk.create_dir, "capture=b"),
        (desk.delete_dir, "spans"),
        (desk.delete_file, "x.parquet"),
    ):
        with pytest.raises(PermissionError, match=f"'{pair}' is a symbolic link"):
            call(f"{pair}/{name}")
    assert sorted(os.listdir(there)) == ["spans", "x.parquet"]
    assert desk.read(f"{pair}/x.parquet", 0, 99) == b"mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_file_for_which_the_disk_has_no_room_leaves_nothing_there(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path))
    first, second = (desk.begin(f"{tmp_path}/captures/{name}") for name in ("x", "y"))
    for token in (first, second):
        desk.uploads[token].stream.close()
        desk.uploads[token].stream = open("/dev/full", "wb")  # noqa: SIM115  closed by the desk
        desk.append(token, 0, b"one")
    with pytest.raises(OSError, match="No space left"):
        desk.finish(first, 3, sha(b"one"))
    desk.abandon(first)
    desk.close()
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path))
    path = f"{tmp_path}/x"
    first, second = desk.begin(path), desk.begin(path)
    desk.append(first, 0, b"first")
    desk.append(second, 0, b"second!")
    desk.finish(second, 7, sha(b"second!"))
    desk.finish(first, 5, sha(b"first"))
    assert (tmp_path / "x").read_bytes() == b"first"
    assert names(tmp_path) == ["x"]


def test_what_lost_writers_and_dead_desks_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".x.999999999.abcd.upload").touch()
    (tmp_path / f".y.{os.getpid()}.abcd.upload").touch()
    desk = Desk(str(tmp_path))
    assert names(tmp_path) == [f".y.{os.getpid()}.abcd.upload"]
    (tmp_path / f".y.{os.getpid()}.abcd.upload").unlink()
    token = desk.begin(f"{tmp_path}/x")
    monkeypatch.setattr(deliver, "FORGOTTEN_S", -1.0)
    desk.begin(f"{tmp_path}/z")
    with pytest.raises(OSError, match="this upload was given up"):
        desk.append(token, 0, b"one")
    desk.close()
    assert names(tmp_path) == []


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep whose entries run on the other node, committing a span after every layer; and its output."""
    folder = tmp_path_factory.mktemp("far")
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["residual_compare"]
    pair = ROOT / "configs" / "pairs" / "pydoc"
    one = {"base_model": str(pair / "base"), "sft_model": str(pair / "sft"), "gpus": 1, "accelerator_type": "FAR"}
    demo |= {"tokenizer": str(pair / "tokenizer"), "spans": {"layers": 2}, "prompts": demo["prompts"][:2]}
    demo["model_sweep"] = [{"name": "pydoc"} | one, {"name": "broken"} | one | {"sft_model": str(folder)}]
    (folder / "far.yaml").write_text(yaml.safe_dump({"residual_compare": demo}))
    home = folder / "home"
    home.mkdir()
    (home / "rate.json").write_text('{"dollars_per_hour": 3.6, "gpus": 2}')
    env = os.environ | {"PAIRSCOPE_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    command = [
        sys.executable,
        str(Path(__file__).with_name("far_node.py")),
        str(folder / "far.yaml"),
        str(folder / "out"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


def test_a_capture_made_on_another_node_lies_whole_on_the_drivers_disk(swept: dict[str, Any]) -> None:
    out = swept["folder"] / "out"
    run = RunDir(str(out))
    (found,) = run.captures()
    assert found.pair == "pydoc", swept["said"]
    assert wrong_files(Path(found.path), found.marker) == {}
    assert not list(out.rglob("*.upload"))
    assert not (Path(found.path) / "spans").exists(), "spans are forgotten once the capture is complete"
    (row,) = (r for r in run.manifest_rows() if r["entry"] == "pydoc")
    log = (out / row["log"]).read_text()
    assert "Device: cpu" in log
    assert "it goes there through Ray" in log
    assert swept["code"] == 1  # of the other entry


def test_what_an_entry_cost_is_its_share_of_the_node_for_the_time_that_it_held_it(swept: dict[str, Any]) -> None:
    (row,) = (r for r in RunDir(str(swept["folder"] / "out")).manifest_rows() if r["entry"] == "pydoc")
    assert row["dollars"] == pytest.approx(1.8 * row["seconds"] / 3600, rel=0.2)


def test_the_driver_leaves_word_of_the_sweep_for_those_at_home(swept: dict[str, Any]) -> None:
    (path,) = (swept["folder"] / "home" / "sweeps").glob("*.json")
    note = json.loads(path.read_text())
    assert note["out"] == str(swept["folder"] / "out")
    assert note["exit_code"] == 1
    assert {(i["entry"], i["state"]) for i in note["items"]} == {("pydoc", "complete"), ("broken", "failed")}
