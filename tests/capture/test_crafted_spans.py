"""Spans with a right checksum that are none of ours: one error that names the file and says what to do, or they are computed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agree
import pytest
import torch
from test_capture import entry_of

from capture import work
from capture.config import Entry
from capture.errors import StoreError
from capture.layout import RunDir
from capture.run import capture_pair, resolve
from capture.settings import Spans
from capture.spans import SpanStore

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any]], Any]

SPAN, STATE = "span-1-1.safetensors", "state-2.safetensors"
LAST = "span-2-2.safetensors"  # what it had found out is gone on with


@pytest.fixture(scope="module")
def entry(pairs: Callable[..., Any]) -> Entry:
    prompts = ("a b", "b a", "of another length")  # a batch of two, and so a noise floor
    return entry_of(pairs("llama"), spans=Spans(layers=1), prompts=prompts, spectrum=True)


@pytest.fixture(scope="module")
def stopped(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which all spans are committed and no tables are written."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.Work, "_write", lambda *_: pytest.fail("no room"))
        with pytest.raises(pytest.fail.Exception):
            capture_pair(entry, str(out))
    return out


@pytest.fixture
def store(entry: Entry, stopped: Path, tmp_path: Path) -> SpanStore:
    run = RunDir(str(shutil.copytree(stopped, tmp_path / "out")))
    return SpanStore(run, run.capture_path("tiny", resolve(entry).capture))


def craft(store: SpanStore, name: str, change: Change) -> None:
    """Change a file's tensors and what it says of itself, and give it the checksum of that."""
    tensors, text = store.read(f"{store.path}/{name}")
    meta = json.loads(text or "{}")
    change(tensors, meta)
    tensors = {n: tensor.clone() for n, tensor in tensors.items()}  # the library writes no tensor twice
    store._write(f"{store.path}/{name}", tensors, json.dumps(meta) if text else "")


def put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, _: tensors.update({key: change(tensors[key]).contiguous()})


def say(**said: Any) -> Change:
    return lambda _, meta: meta.update(said)


def find(**found: Any) -> Change:
    return lambda _, meta: meta["found"].update(found)


LISTS = "topk/1/pairwise/increased"
CRAFTED: dict[str, tuple[str, Change]] = {
    "a batch less": (STATE, lambda t, _: [t.pop(n) for n in list(t) if n.startswith("2.")]),
    "a batch more": (STATE, lambda t, _: t.update({n.replace("2.", "3."): x for n, x in t.items() if n.startswith("2.")})),
    "a slot less": (STATE, lambda t, _: t.pop("1.0")),
    "a slot less in each": (STATE, lambda t, _: [t.pop(n) for n in list(t) if n.endswith(".0")]),
    "no states": (STATE, lambda t, _: t.clear()),
    "another name": (STATE, lambda t, _: t.update(x=t.pop("0.0"))),
    "fewer tokens": (STATE, put("0.1", lambda x: x[:, 1:])),
    "another width": (STATE, put("0.0", lambda x: x[..., :8])),
    "two axes": (STATE, put("0.0", lambda x: x[0])),
    "states in float64": (STATE, put("0.0", torch.Tensor.double)),
    "states in bfloat16": (STATE, put("1.1", torch.Tensor.bfloat16)),
    "states of integers": (STATE, put("1.1", torch.Tensor.long)),
    "a column less": (SPAN, lambda t, _: t.pop("runs/norm")),
    "a column more": (SPAN, lambda t, _: t.update({"runs/more": t["runs/norm"]})),
    "a table more": (SPAN, lambda t, _: t.update({"queue/norm": t["runs/norm"]})),
    "no columns": (SPAN, lambda t, _: t.clear()),
    "a column that would spread": (SPAN, put("runs/norm", lambda x: x[..., :1])),
    "a column of more layers": (SPAN, put("pairwise/norm_diff", lambda x: x.repeat(1, 2, 1))),
    "a column in float64": (SPAN, put("runs/norm", torch.Tensor.double)),
    "a column in bfloat16": (SPAN, put("tracked/logits", torch.Tensor.bfloat16)),
    "a spectrum less": (SPAN, lambda t, _: t.pop("spectrum/singular_values")),
    "a list less": (SPAN, lambda t, _: t.pop(f"{LISTS}/ids")),
    "a list's values less": (SPAN, lambda t, _: t.pop(f"{LISTS}/values")),
    "lists of another layer": (SPAN, lambda t, _: t.update({n.replace("/1/", "/2/"): t.pop(n) for n in list(t) if n.startswith("topk")})),
    "shorter lists": (SPAN, put(f"{LISTS}/ids", lambda x: x[..., 1:])),
    "lists in int64": (SPAN, put(f"{LISTS}/ids", torch.Tensor.long)),
    "tokens that no model has": (SPAN, put(f"{LISTS}/ids", lambda x: x + 10**6)),
    "tokens below 0": (SPAN, put(f"{LISTS}/ids", lambda x: x - 1000)),
    "no host": (SPAN, lambda _, meta: meta.pop("host")),
    "a process of words": (SPAN, say(process="x")),
    "nothing found": (LAST, lambda _, meta: meta.pop("found")),
    "a pass less": (LAST, lambda _, meta: meta["slot_of"].pop("BB")),
    "slots that are not there": (LAST, say(slot_of={"BB": 0, "BS": 1, "SB": 2, "SS": 9})),
    "slots of words": (LAST, say(slot_of={"BB": "0", "BS": "1", "SB": "2", "SS": "3"})),
    "slots in a list": (LAST, say(slot_of=[0, 1, 2, 3])),
    "shared layers of words": (LAST, say(shared_layers="x")),
    "a batch that is not there in parts": (LAST, say(splits=[[0, 9, 2]])),
    "a batch from the end in parts": (LAST, say(splits=[[0, -1, 1]])),
    "no parts": (LAST, say(splits=[[0, 0, 0]])),
    "parts of words": (LAST, say(splits=[["a", 0, 1]])),
    "half a split": (LAST, say(splits=[[0]])),
    "no noise": (LAST, find(noise={})),
    "noise of a layer": (LAST, lambda _, meta: [v.pop() for v in meta["found"]["noise"]["BB"].values()]),
    "noise of words": (LAST, lambda _, meta: meta["found"]["noise"]["BB"].update(norm_diff="abcd")),
    "mass of words": (LAST, find(left_out_mass={"base": "x", "sft": 0.0})),
    "no number of rows": (LAST, find(nonfinite=None)),
}  # fmt: skip


@pytest.mark.parametrize("what", CRAFTED)
def test_what_does_not_fit_the_walk_is_an_error_that_names_the_file(what: str, entry: Entry, store: SpanStore) -> None:
    name, change = CRAFTED[what]
    craft(store, name, change)
    with pytest.raises(StoreError, match=f"'{store.path}/{name}' cannot be gone on from: .*; capture with --force$"):
        capture_pair(entry, store.run.out)


def test_force_is_the_way_out(entry: Entry, store: SpanStore) -> None:
    craft(store, *CRAFTED["a batch less"])
    assert capture_pair(entry, store.run.out, force=True).state == "complete"


def as_undisturbed(entry: Entry, out: str, tmp_path: Path) -> bool:
    """Whether a capture that goes on there ends with the rows of one that nothing happened to."""
    capture_pair(entry, str(tmp_path / "undisturbed"))
    here, there = (agree.read_tables(capture_pair(entry, str(o)).path) for o in (out, tmp_path / "undisturbed"))
    sort = {table: [(column, "ascending") for column in agree.KEYS[table]] for table in here}
    return all(rows.sort_by(sort[table]).equals(there[table].sort_by(sort[table])) for table, rows in here.items())


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000], ids=["cut", "none", "nested"])
def test_layers_of_a_span_that_says_nothing_of_itself_are_computed_again(
    text: str, entry: Entry, store: SpanStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.span_path(2, 2)
    store._write(path, store.read(path)[0], text)
    assert as_undisturbed(entry, store.run.out, tmp_path)
    assert f"'{path}' is none of ours" in caplog.text
    assert "its layers are computed again" in caplog.text


def test_a_span_up_to_the_last_layer_does_not_stand_for_what_comes_behind_it(
    entry: Entry, store: SpanStore, tmp_path: Path
) -> None:
    tensors, text = store.read(store.span_path(2, 2))
    longer = {n.replace("/2/", "/3/"): x.clone() for n, x in tensors.items() if n.startswith("topk/")}
    longer |= {n: x if n.startswith("topk/") else x.repeat_interleave(2, 1) for n, x in tensors.items()}
    store._write(store.span_path(2, 3), longer, text)
    Path(store.span_path(2, 2)).unlink()
    Path(store.state_path(2)).rename(store.state_path(3))
    assert as_undisturbed(entry, store.run.out, tmp_path)


def test_a_span_that_ends_before_it_begins_is_none(entry: Entry, store: SpanStore, tmp_path: Path) -> None:
    shutil.copy(store.span_path(1, 1), store.span_path(1, 0))  # as the next of itself there would be no end
    Path(store.span_path(1, 1)).unlink()
    assert store.committed() == []
    assert as_undisturbed(entry, store.run.out, tmp_path)
