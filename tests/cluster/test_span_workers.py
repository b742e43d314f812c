"""An entry cut over several workers: Ray places them, what they hand over travels in its object store, a lost one costs its span."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_work import make_entry
from test_rank_groups import PYDOC
from test_rank_groups import entry as pydoc

from capture.config import Entry
from capture.layout import RunDir
from capture.relay import cut
from capture.run import capture_pair
from capture.settings import Spans

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("runs", "pairwise", "runs_topk", "pairwise_topk", "prompts", "tokens")
REAL = "capture.run:capture_pair"


def cut_entry(**changes: Any) -> Entry:
    return pydoc(**({"tensor_parallel": 1, "mode": "streamed", "spans": Spans(workers=3)} | changes))


def on_two_nodes(out: Path, entry: Entry, work: str = REAL, *more: str) -> dict[str, Any]:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "two_nodes.py"), str(out), work, entry.model_dump_json(), *more],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        if (
            "timed out during startup" not in done.stderr
        ):  # Ray gives its nodes 30 seconds, whatever else the machine does
            break
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def capture_dir(out: Path) -> Path:
    (found,) = out.glob("captures/*/*")
    return found


def document(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((capture_dir(out) / "capture.json").read_text())
    return found


def same_tables(a: Path, b: Path) -> None:
    for table in TABLES:
        x, y = (
            pq.ParquetDataset([str(p) for p in sorted(d.glob(f"{table}[.-]*parquet"))], partitioning=None).read()
            for d in (a, b)
        )
        keys = [k for k in ("prompt_idx", "run", "base_run", "sft_run", "layer", "position") if k in x.column_names]
        x, y = (t.cast(_plain(t.schema)).sort_by([(k, "ascending") for k in keys]) for t in (x, y))
        assert x.num_rows > 0
        assert x.equals(y), table


def _plain(schema: Any) -> Any:
    """The schema with dictionary-encoded columns as plain strings: rows are compared, not their encoding."""
    import pyarrow as pa

    fields = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    return pa.schema(fields)


def bytes_by_key() -> dict[str, int]:
    """Bytes of every weight of both models of the pair."""
    from safetensors import safe_open

    found: dict[str, int] = {}
    for owner in ("base", "sft"):
        with safe_open(PYDOC / owner / "model.safetensors", framework="pt") as file:
            found |= {f"{owner}:{key}": file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    return found


def bytes_of_layers(first: int, last: int) -> int:
    wanted = {str(layer) for layer in range(max(first, 0), last + 1)}
    return sum(
        n for key, n in bytes_by_key().items() if "layers." in key and key.split("layers.")[1].split(".")[0] in wanted
    )


def bytes_of_ends() -> int:
    return sum(n for key, n in bytes_by_key().items() if "layers." not in key)


def cut_by_bytes(count: int) -> list[tuple[int, int]]:
    layers = sorted({int(k.split("layers.")[1].split(".")[0]) for k in bytes_by_key() if "layers." in k})
    return cut([bytes_of_layers(layer, layer) for layer in layers], count)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker walks all layers."""
    out = tmp_path_factory.mktemp("alone")
    return Path(capture_pair(cut_entry(spans=Spans()), str(out)).path)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Three workers on two nodes; the second is lost behind its first layer."""
    out = tmp_path_factory.mktemp("killed")
    return on_two_nodes(out, cut_entry(), "span_work:killed_once"), out


def test_three_spans_on_two_nodes_with_a_worker_killed_give_the_tables_of_one_worker(killed: Any, alone: Path) -> None:
    found, out = killed
    assert found["state"] == "complete", found
    same_tables(capture_dir(out), alone)
    ranges = [(w["first"], w["last"]) for w in document(out)["workers"]]
    assert ranges == cut_by_bytes(3)
    rows = [(r["state"], r["error_class"]) for r in RunDir(str(out)).manifest_rows()]
    assert rows == [("failed", "WorkerDiedError"), ("complete", None)]


def test_only_the_span_of_the_killed_worker_is_done_again(killed: Any) -> None:
    found, out = killed
    assert (out / "killed").read_text() == str(cut_by_bytes(3)[1][0])  # its first layer was computed when it died
    walked = [span for span, _ in found["placed"]]
    assert walked.count(0) == 1
    assert walked.count(1) == 2
    expected = [bytes_of_layers(first, last) for first, last in cut_by_bytes(3)]
    assert [w["bytes_read"] - bytes_of_ends() for w in document(out)["workers"]] == expected


def test_neighbouring_spans_are_walked_on_different_nodes(killed: Any) -> None:
    placed = killed[0]["placed"]
    assert [span for span, _ in placed[:2]] == [0, 1]
    assert placed[0][1] != placed[1][1]
    assert [span for span, _ in placed[-2:]] == [1, 2]  # after the loss
    assert placed[-2][1] != placed[-1][1]


def test_the_next_spans_weights_are_read_while_the_one_before_computes(killed: Any) -> None:
    first, second, _ = document(killed[1])["workers"]
    ahead = int((killed[1] / "prefetched").read_text())  # the first worker went on only when this was written
    assert ahead >= bytes_of_layers(second["first"], second["first"])
    assert second["prefetched"] <= second["received"]
    assert first["finished"] <= second["received"]


def test_what_was_lost_with_its_node_is_made_again(alone: Path, tmp_path: Path) -> None:
    found = on_two_nodes(tmp_path, cut_entry(), REAL, "lose-node")
    assert found["state"] == "complete", found
    same_tables(capture_dir(tmp_path), alone)
    assert [span for span, _ in found["placed"]].count(0) == 2
    errors = [r["error_class"] for r in RunDir(str(tmp_path)).manifest_rows()]
    assert errors[-1] is None
    assert set(errors[:-1]) <= {"LostError", "WorkerDiedError"}


def test_each_span_may_have_a_tensor_parallel_group_of_its_own(tmp_path: Path) -> None:
    shared = cut_entry(tensor_parallel=2, spans=Spans())
    whole, spans = tmp_path / "whole", tmp_path / "spans"
    assert on_two_nodes(whole, shared)["state"] == "complete"
    found = on_two_nodes(spans, shared.model_copy(update={"spans": Spans(workers=2)}))
    assert found["state"] == "complete", found
    same_tables(capture_dir(spans), capture_dir(whole))
    assert document(spans)["tensor_parallel"] == 2
    assert len(document(spans)["workers"]) == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_entry_goes_to_another_node_where_the_hub_is_out_of_reach_of_its_own(tmp_path: Path, ranks: int) -> None:
    hub = {"base_model": "org/base", "sft_model": "org/sft", "tokenizer": "org/base"}
    entry = make_entry("e", **hub, tensor_parallel=ranks)
    found = on_two_nodes(tmp_path, entry, "fake_work:cut_off_where_it_began")
    assert found["state"] == "complete", found
    (_, first), (_, second) = found["placed"]
    assert first != second
    assert "HubUnreachableError: the hub cannot be reached; trying again: again, on another node" in found["said"]
    assert [r["state"] for r in RunDir(str(tmp_path)).manifest_rows()] == ["failed", "complete"]


def test_where_no_node_reaches_the_hub_an_entry_fails_on_each_once(tmp_path: Path) -> None:
    entry = make_entry("e", base_model="org/base", sft_model="org/sft", tokenizer="org/base")
    found = on_two_nodes(tmp_path, entry, "fake_work:cut_off_everywhere")
    assert found["state"] == "failed"
    assert found["row"]["error_class"] == "HubUnreachableError"
    assert len({node for _, node in found["placed"]}) == len(found["placed"]) == 2
