"""Spans: what is committed is not computed again, and a walk that was cut or killed gives the same numbers."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import agree
import pytest
import tiny
import torch
from test_capture import entry_of

from capture import work
from capture.errors import StoreError
from capture.layout import RunDir
from capture.run import capture_pair, resolve
from capture.settings import Spans
from capture.spans import SpanStore

CUT = Spans(layers=1)

# A worker that is killed the moment it has committed layer 1.
KILLED = """
import os, signal, sys
from capture import spanwalk
from capture.config import Entry
from capture.run import capture_pair
commit = spanwalk.SpanWalk.commit
def then_die(self, state):
    commit(self, state)
    if state.layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
spanwalk.SpanWalk.commit = then_die
capture_pair(Entry.model_validate_json(sys.argv[1]), sys.argv[2])
"""


def reads_of(monkeypatch):
    """The ledgers of captures made from now on."""
    kept = []
    opened = work.Work._open

    def remember(self):
        opened(self)
        kept.append(self.ledger)

    monkeypatch.setattr(work.Work, "_open", remember)
    return kept


def document(out):
    return json.loads(next(Path(out).glob("captures/*/*/capture.json")).read_text())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_cut_walk_gives_the_rows_of_one_that_is_not_cut(arch, pairs, tmp_path):
    whole = capture_pair(entry_of(pairs(arch)), str(tmp_path / "whole"))
    cut = capture_pair(entry_of(pairs(arch), spans=CUT), str(tmp_path / "cut"))
    assert [(s["first"], s["last"]) for s in document(tmp_path / "cut")["spans"]] == [(-1, 0), (1, 1), (2, 2)]
    a, b = agree.read_tables(whole.path), agree.read_tables(cut.path)
    for table, rows in a.items():
        order = [(c, "ascending") for c in agree.KEYS[table]]
        assert rows.sort_by(order).equals(b[table].sort_by(order)), table
    assert not (Path(cut.path) / "spans").exists()


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_killed_worker_costs_one_span_and_changes_no_byte(mode, pairs, tmp_path, monkeypatch):
    entry = entry_of(pairs("mixtral"), spans=CUT, mode=mode, prompts=("one length", "two length", "of another length"))
    undisturbed = capture_pair(entry, str(tmp_path / "undisturbed"))
    out = tmp_path / "killed"
    dead = subprocess.run([sys.executable, "-c", KILLED, entry.model_dump_json(), str(out)], check=False)
    assert dead.returncode == -signal.SIGKILL
    assert list(RunDir(str(out)).captures()) == []
    ledgers = reads_of(monkeypatch)
    again = capture_pair(entry, str(out))
    layers = {int(key.split("layers.")[1].split(".")[0]) for key in ledgers[0].reads if "layers." in key}
    assert layers == {2, 3}
    found = document(out)
    processes = [s["process"] for s in found["spans"]]
    assert processes[0] == processes[1] != processes[2]
    assert found["noise_floor"] == document(tmp_path / "undisturbed")["noise_floor"]
    marker, expected = (
        RunDir(str(o)).marker(r.path) for o, r in ((out, again), (tmp_path / "undisturbed", undisturbed))
    )
    assert marker["files"] == expected["files"]


def test_an_attempt_goes_on_where_the_last_whole_span_ends(pairs, tmp_path, monkeypatch):
    entry = entry_of(pairs("llama"), spans=CUT)
    store = SpanStore(RunDir(str(tmp_path)), RunDir(str(tmp_path)).capture_path("tiny", resolve(entry).capture))
    monkeypatch.setattr(work.Work, "_write", lambda *_: pytest.fail("no room"))
    with pytest.raises(pytest.fail.Exception):
        capture_pair(entry, str(tmp_path))
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 0), (1, 1), (2, 2)]
    Path(store.state_path(2)).rename(store.state_path(1))  # as if the worker had died between the two files
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 0), (1, 1)]
    Path(store.span_path(-1, 0)).unlink()
    assert store.committed() == []


def test_of_spans_that_were_cut_elsewhere_what_fits_is_taken(tmp_path):
    """An attempt that died before the states behind its span were written, and one after it with its own cuts."""
    store = SpanStore(RunDir(str(tmp_path)), RunDir(str(tmp_path)).capture_path("p", "c"))
    states = [[torch.ones(1, 1, 1)]]
    store.commit(-1, 3, {}, {}, states)
    Path(store.state_path(3)).unlink()
    store.commit(-1, 1, {}, {}, states)
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 1)]
    store.commit(2, 5, {}, {}, states)
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 1), (2, 5)]
    assert store.committed(last=4) == [], "the states behind layer 1 are forgotten"
    store.commit(4, 4, {}, {}, states)
    assert [(s.first, s.last) for s in store.committed(last=4)] == [(-1, 3), (4, 4)]
    Path(store.span_path(2, 5)).write_bytes(b"broken")
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 3), (4, 4)]


def test_states_are_gone_on_from_with_what_their_own_span_knew(tmp_path):
    """Two attempts ended a span with the same layer, and one of them had cut its batches in parts."""
    store = SpanStore(RunDir(str(tmp_path)), RunDir(str(tmp_path)).capture_path("p", "c"))
    states = [[torch.ones(1, 1, 1)]]
    store.commit(-1, 5, {}, {"splits": []}, states)
    store.commit(-1, 1, {}, {"splits": []}, states)
    store.commit(2, 5, {}, {"splits": [[3, 0, 2]]}, states)
    assert store.committed()[-1].meta == {"splits": [[3, 0, 2]]}


def test_a_longer_span_of_another_transformers_does_not_hide_what_this_one_committed(tmp_path, monkeypatch):
    store = SpanStore(RunDir(str(tmp_path)), RunDir(str(tmp_path)).capture_path("p", "c"))
    with monkeypatch.context() as other:
        other.setattr("capture.spans.made_with", lambda: "torch 2.13.0, transformers 5.22.1")
        store.commit(-1, 3, {}, {}, [[torch.ones(1, 1, 1)]])
    store.commit(-1, 1, {}, {}, [[torch.ones(1, 1, 1)]])
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 1)]


def test_force_begins_anew(pairs, tmp_path, monkeypatch):
    entry = entry_of(pairs("llama"), spans=CUT)
    with monkeypatch.context() as broken:
        broken.setattr(work.Work, "_write", lambda *_: pytest.fail("no room"))
        with pytest.raises(pytest.fail.Exception):
            capture_pair(entry, str(tmp_path))
    ledgers = reads_of(monkeypatch)
    capture_pair(entry, str(tmp_path), force=True)
    assert any("layers.0." in key for key in ledgers[0].reads)


def test_what_another_transformers_committed_is_computed_again(pairs, tmp_path, monkeypatch, caplog):
    """Its layers may compute otherwise, and capture.json names one version for all layers."""
    entry = entry_of(pairs("llama"), spans=CUT)
    with monkeypatch.context() as broken:
        broken.setattr(work.Work, "_write", lambda *_: pytest.fail("no room"))
        broken.setattr("capture.spans.made_with", lambda: "torch 2.13.0, transformers 5.22.1")
        with pytest.raises(pytest.fail.Exception):
            capture_pair(entry, str(tmp_path))
    ledgers = reads_of(monkeypatch)
    capture_pair(entry, str(tmp_path))
    assert {key.split("layers.")[1][0] for key in ledgers[0].reads if "layers." in key} == set("0123")
    assert re.search(
        r"was made with torch .*, transformers 5\.22\.1, not .*; its layers are computed again", caplog.text
    )


def test_short_walks_commit_nothing(pairs, tmp_path):
    capture_pair(entry_of(pairs("llama")), str(tmp_path))
    assert document(tmp_path)["spans"] == []


def test_spans_that_say_something_else_are_an_error_with_a_way_out(pairs, tmp_path):
    entry = entry_of(pairs("llama"), spans=CUT)
    run = RunDir(str(tmp_path))
    store = SpanStore(run, run.capture_path("tiny", resolve(entry).capture))
    for meta in ({}, {"found": 5}, []):  # of another version, say
        store.commit(-1, 0, {}, meta, [[torch.zeros(1, 1, 1)]])
        with pytest.raises(StoreError, match=r"cannot be gone on from.*--force"):
            capture_pair(entry, str(tmp_path))
    assert capture_pair(entry, str(tmp_path), force=True).state == "complete"


def test_who_loses_a_race_for_a_capture_leaves_no_spans_behind(pairs, tmp_path, monkeypatch):
    """The winner clears away what both have committed; the loser commits once more, and finds the rest gone."""
    entry = entry_of(pairs("llama"), spans=CUT)
    capture_pair(entry, str(tmp_path / "winner"))
    (won,) = (tmp_path / "winner").glob("captures/*/*")
    commit = work.SpanWalk.commit

    def won_meanwhile(self, state):
        commit(self, state)
        if state.layer == 1:
            mine = Path(self.store.path).parent
            shutil.rmtree(self.store.path)
            shutil.copytree(won, mine, dirs_exist_ok=True)

    monkeypatch.setattr(work.SpanWalk, "commit", won_meanwhile)
    assert capture_pair(entry, str(tmp_path / "out")).state == "skipped"
    assert not list((tmp_path / "out").rglob("spans"))


@pytest.mark.parametrize("spans", [(), ("span--1-0.safetensors",)])
def test_spans_of_a_complete_capture_are_cleared_away_be_they_files_or_an_empty_directory(spans, pairs, tmp_path):
    result = capture_pair(entry_of(pairs("llama")), str(tmp_path))
    left = Path(result.path) / "spans"
    left.mkdir()
    for name in spans:
        (left / name).write_bytes(b"x")
    run = RunDir(str(tmp_path))
    run.remove_leftovers()
    assert not left.exists()
    left.mkdir()
    SpanStore(run, result.path).clear()
    assert not left.exists()


def test_states_are_those_that_were_found_though_another_writer_has_got_further_and_forgot_them(tmp_path):
    run = RunDir(str(tmp_path))
    mine, other = (SpanStore(run, run.capture_path("p", "c")) for _ in range(2))
    other.commit(-1, 0, {}, {}, [[torch.ones(1, 1, 1)]])
    (span,) = mine.committed()
    other.commit(1, 1, {}, {}, [[torch.zeros(1, 1, 1)]])
    assert mine.states(span, torch.device("cpu")) == [[torch.ones(1, 1, 1)]]


def test_states_that_another_writer_forgets_at_the_same_moment_are_no_error(tmp_path, monkeypatch):
    run = RunDir(str(tmp_path))
    store = SpanStore(run, run.capture_path("p", "c"))
    store.commit(-1, 0, {}, {}, [[torch.ones(1, 1, 1)]])
    listed = run.list_dir

    def and_then_forgotten(path):
        found = listed(path)
        Path(store.state_path(0)).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(run, "list_dir", and_then_forgotten)
    store.commit(1, 1, {}, {}, [[torch.ones(1, 1, 1)]])
    assert [(s.first, s.last) for s in store.committed()] == [(-1, 0), (1, 1)]


def test_a_walk_goes_on_with_states_that_layers_have_made_wider(tmp_path, monkeypatch):
    """Mamba's carry the residual in float32, whatever enters them."""
    paths = tiny.make_pair("mamba", tmp_path / "pair", dtype=torch.bfloat16)
    entry = entry_of(paths, spans=CUT, dtype="bfloat16", prompts=("a bc",))
    with monkeypatch.context() as broken:
        broken.setattr(work.Work, "_write", lambda *_: pytest.fail("no room"))
        with pytest.raises(pytest.fail.Exception):
            capture_pair(entry, str(tmp_path / "out"))
    assert capture_pair(entry, str(tmp_path / "out")).state == "complete"
