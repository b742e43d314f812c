"""Tables are there whole or not at all, the marker comes last, and what was complete stays complete."""

import errno
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from capture import store
from capture.errors import StoreError
from capture.layout import RunDir
from capture.schema import arrow_schema
from capture.store import CaptureWriter, category
from capture.tables import round_to_half


def tracked(n):
    zeros = np.zeros(n)
    yield {
        "pair": category(zeros, ["p"]),
        "capture": category(zeros, ["c"]),
        "slot": np.arange(n, dtype=np.int16),
        "token_id": np.arange(n, dtype=np.int32),
        "token": np.array(["t"] * n, object),
        "label": np.array(["l"] * n, object),
    }


def written(out, n=3, part=None):
    writer = CaptureWriter(RunDir(str(out)), "p", "c")
    writer.table("tracked_tokens", tracked(n), part)
    return writer


def test_nothing_exists_before_the_marker(tmp_path):
    writer = written(tmp_path)
    assert list(RunDir(str(tmp_path)).captures()) == []
    assert not list(tmp_path.glob("captures/*/*/*.parquet"))
    writer.finish({})
    assert RunDir(str(tmp_path)).is_complete("p", "c")
    (found,) = RunDir(str(tmp_path)).captures()
    assert [f["rows"] for f in found.marker["files"]] == [3]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_new_capture_takes_the_place_of_the_old_at_the_end_and_leaves_none_of_its_parts(tmp_path):
    for part in (None, 0):
        writer = written(tmp_path, part=part)
        assert RunDir(str(tmp_path)).is_complete("p", "c") == (part == 0)
        writer.finish({})
    assert [p.name for p in tmp_path.glob("captures/*/*/*.parquet")] == ["tracked_tokens-00000.parquet"]
    assert RunDir(str(tmp_path)).is_complete("p", "c")


def test_two_writers_of_the_same_capture_do_not_harm_each_other(tmp_path):
    first, second = written(tmp_path), written(tmp_path)
    first.finish({"by": 1})
    second.finish({"by": 2})
    assert RunDir(str(tmp_path)).is_complete("p", "c")
    assert pq.read_table(next(tmp_path.rglob("tracked_tokens.parquet"))).num_rows == 3


def test_who_finds_the_capture_finished_by_another_leaves_it_unless_it_is_damaged(tmp_path):
    run, late, again = RunDir(str(tmp_path)), written(tmp_path, part=0), written(tmp_path, part=0)
    written(tmp_path).finish({"by": "another"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".tmp-" not in str(path)}
    late.finish({"by": "late"}, keep=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run.is_complete("p", "c")
    whole = next(tmp_path.rglob("tracked_tokens.parquet"))
    whole.write_bytes(b"x" * whole.stat().st_size)
    again.finish({"by": "again"}, keep=True)
    assert run.is_complete("p", "c")
    assert run.damage("p", "c") is None
    assert json.loads(next(tmp_path.rglob("capture.json")).read_text()) == {"by": "again"}
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_discarded_capture_leaves_nothing_but_not_less_than_was_there(tmp_path):
    written(tmp_path).discard()
    assert not list(tmp_path.rglob("capture=*"))
    written(tmp_path).finish({})
    written(tmp_path).discard()
    assert RunDir(str(tmp_path)).is_complete("p", "c")


def test_a_file_that_lost_bytes_is_not_complete(tmp_path):
    written(tmp_path).finish({})
    file = next(tmp_path.rglob("tracked_tokens.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    assert not RunDir(str(tmp_path)).is_complete("p", "c")


def test_a_full_disk_is_one_clear_error_and_no_capture(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "_sync_and_hash", full)
    with pytest.raises(StoreError, match=r"captures/pair=p/capture=c/tracked_tokens\.parquet': the disk is full"):
        written(tmp_path).finish({})
    assert list(RunDir(str(tmp_path)).captures()) == []


def test_a_second_ctrl_c_while_a_slow_disk_is_waited_for_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    writer = written(tmp_path)
    writer.files  # noqa: B018  all of it is on the disk
    monkeypatch.setattr(writer._thread, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.discard()
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match="out"):
        written(tmp_path / "out")


def test_a_marker_of_another_schema_version_is_an_error_that_names_it(tmp_path):
    written(tmp_path).finish({})
    marker = next(tmp_path.rglob("_COMPLETE"))
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 99}))
    with pytest.raises(StoreError, match="schema version 99, this pairscope reads version 1"):
        list(RunDir(str(tmp_path)).captures())


def test_values_survive_with_nan_as_null(tmp_path):
    schema = arrow_schema("runs")
    n = 4
    columns = {
        "pair": category(np.zeros(n), ["p"]),
        "capture": category(np.zeros(n), ["c"]),
        "prompt_idx": np.zeros(n, np.int32),
        "variant": category(np.zeros(n), ["identity"]),
        "run": category([0, 0, 1, 1], ["BB", "SS"]),
        "layer": np.array([-1, 0, -1, 0], np.int16),
        "position": np.zeros(n, np.int32),
        "norm": np.array([1.5, 2.5, 1e-30, 3e38], np.float32),
        "norm_delta": np.array([np.nan, 1, np.nan, 2], np.float32),
        "cosine_distance_prev": np.array([np.nan, 1e-9, np.nan, 2], np.float32),
        "entropy": np.full(n, np.nan, np.float32),
        "next_token_logprob": np.array([-1, -2, -3, np.nan], np.float32),
        "tracked_logits": np.array([[1, 2], [3, 4], [np.nan, np.nan], [5, 6]], np.float32),
    }
    writer = CaptureWriter(RunDir(str(tmp_path)), "p", "c")
    writer.table("runs", [columns])
    writer.finish({})
    table = pq.read_table(next(tmp_path.rglob("runs.parquet")), partitioning=None)
    assert table.schema.names == schema.names
    assert table["run"].to_pylist() == ["BB", "BB", "SS", "SS"]
    assert table["norm"].to_pylist() == columns["norm"].tolist()
    assert table["norm_delta"].to_pylist() == [None, 1, None, 2]
    assert table["entropy"].to_pylist() == [None] * n
    assert table["tracked_logits"].to_pylist() == [[1, 2], [3, 4], None, [5, 6]]
    assert table.schema.field("norm").nullable is False


def test_what_killed_writers_left_behind_is_removed_and_living_ones_are_let_be(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    written(tmp_path).finish({})
    (path,) = tmp_path.glob("captures/*/*")
    dead, alive = (path / f".tmp-{socket.gethostname()}-{pid}--x" for pid in (gone.pid, os.getpid()))
    dead.mkdir()
    alive.mkdir()
    written(tmp_path).finish({})
    assert not dead.exists()
    assert alive.exists()


def test_values_of_lists_are_rounded_to_half_precision_where_asked_for_and_lose_bytes(tmp_path):
    rng = np.random.default_rng(0)
    n, k = 3000, 10
    values = -np.sort(-rng.normal(0, 9, (n, k)).astype(np.float32))
    rounded = round_to_half(values)
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, values.astype(np.float16).astype(np.float32)), "as float16, within its range"
    far = round_to_half(np.float32([1e30, -3e-30, 0, np.inf]))
    assert np.allclose(far, np.float32([1e30, -3e-30, 0, np.inf]), rtol=2**-11, atol=0), "and with float32's range"
    assert np.isnan(round_to_half(np.float32([np.nan]))).all()
    sizes = [written_lists(tmp_path / name, content) for name, content in (("all", values), ("half", rounded))]
    assert sizes[1] < 0.8 * sizes[0]


def written_lists(out, values):
    n, k = values.shape
    keys = {
        "pair": category(np.zeros(n), ["p"]), "capture": category(np.zeros(n), ["c"]), "prompt_idx": np.zeros(n, np.int32),
        "variant": category(np.zeros(n), ["identity"]), "run": category(np.zeros(n), ["BB"]), "layer": np.zeros(n, np.int16),
        "position": np.arange(n, dtype=np.int32),
    }  # fmt: skip
    ids = np.random.default_rng(1).integers(0, 49152, (n, k)).astype(np.int32)
    writer = CaptureWriter(RunDir(str(out)), "p", "c")
    writer.table("runs_topk", [keys | {"ids": ids, "logits": values}])
    writer.finish({})
    file = next(out.rglob("runs_topk.parquet"))
    encodings = {c.path_in_schema: c.encodings for c in _columns(file)}
    assert encodings["ids.list.element"] == encodings["logits.list.element"] == ("RLE", "BYTE_STREAM_SPLIT")
    assert pq.read_table(file, partitioning=None)["ids"].to_pylist() == ids.tolist()
    return file.stat().st_size


def test_ids_and_texts_that_are_there_once_are_written_without_a_dictionary(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.flatnonzero(rng.random(40_000) < 0.4).astype(np.int32)
    texts = [f"{i:x} é\u4f60"[rng.integers(4) :] for i in ids.tolist()]
    n = len(ids)
    writer = CaptureWriter(RunDir(str(tmp_path)), "p", "c")
    writer.table(
        "vocabulary",
        [{"pair": category(np.zeros(n), ["p"]), "capture": category(np.zeros(n), ["c"]), "token_id": ids,
          "token": np.array(texts, object)}],
    )  # fmt: skip
    writer.finish({})
    file = next(tmp_path.rglob("vocabulary.parquet"))
    encodings = {c.path_in_schema: c.encodings for c in _columns(file)}
    assert "DELTA_BINARY_PACKED" in encodings["token_id"]
    assert "DELTA_LENGTH_BYTE_ARRAY" in encodings["token"]
    read = pq.read_table(file, partitioning=None)
    assert (read["token_id"].to_pylist(), read["token"].to_pylist()) == (ids.tolist(), texts)


def _columns(file):
    group = pq.ParquetFile(file).metadata.row_group(0)
    return [group.column(i) for i in range(group.num_columns)]


def test_a_directory_that_goes_while_it_is_listed_is_looked_at_again(tmp_path):
    """As where another writer of the same capture clears its spans away."""

    class Going:
        type_name = "local"

        def __init__(self, times):
            self.times = times

        def get_file_info(self, selector):
            self.times -= 1
            if self.times >= 0:
                raise FileNotFoundError(2, "No such file or directory")
            return fs.LocalFileSystem().get_file_info(selector)

    (tmp_path / "one").touch()
    run = RunDir(str(tmp_path))
    run.fs = Going(3)
    assert [info.base_name for info in run.list_dir(str(tmp_path))] == ["one"]
    run.fs = Going(10**6)
    assert run.list_dir(str(tmp_path)) == [], "each time it had gone again"
