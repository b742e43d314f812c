"""Spans over workers: the layers of a capture walked by several workers in turn give the tables of one walk."""

import itertools
import json
from pathlib import Path

import agree
import pytest
import torch
from test_capture import entry_of

from capture import relay as relays
from capture.errors import UnsupportedModelError
from capture.parcels import Parcel, unpack
from capture.relay import LostError, Relay, Sent, cut
from capture.run import capture_pair
from capture.settings import Spans

PROMPTS = ("one length", "two length", "of another length")


def send(outbox):
    """A handover as an object store would carry it: every parcel cut into its parts."""
    parts = tuple(
        tuple(outbox.part(p, i) for i in range(header.n_parts)) for p, header in enumerate(outbox.handover.parcels)
    )
    return Sent(outbox.handover, parts)


def run_relay(entry, out, count, only=None):
    """Each worker in turn, in this process; with `only`, those workers' relays get what the others sent before."""
    sent, results = [], []
    for index in range(count):
        relay = Relay(index, count)
        relay.give(tuple(sent))
        results.append(capture_pair(entry, str(out), relay=relay))
        if index < count - 1:
            sent.append(send(relay.outbox))
    return results, sent


def document(result):
    return json.loads((Path(result.path) / "capture.json").read_text())


def same_tables(a, b):
    x, y = agree.read_tables(a.path), agree.read_tables(b.path)
    for table, rows in x.items():
        order = [(c, "ascending") for c in agree.KEYS[table]]
        assert rows.sort_by(order).equals(y[table].sort_by(order)), table
    assert x.keys() == y.keys()


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"mode": "streamed"}),
        ("mixtral", {"mode": "resident", "spectrum": True}),
        ("gemma2", {"mode": "streamed", "dtype": "bfloat16", "spans": Spans(layers=1)}),
    ],
)
def test_three_workers_give_the_tables_of_one(arch, settings, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(relays, "PART_BYTES", 1000)  # many parts, which end in the middle of arrays
    monkeypatch.setattr("capture.parcels.PART_BYTES", 1000)
    entry = entry_of(pairs(arch, num_hidden_layers=4), prompts=PROMPTS, **settings)
    whole = capture_pair(entry, str(tmp_path / "whole"))
    results, sent = run_relay(entry, tmp_path / "relay", 3)
    same_tables(whole, results[-1])
    assert [r.handover is None for r in results] == [False, False, True]
    assert len(sent[0].parts[-1]) > 1
    workers = document(results[-1])["workers"]
    ranges = [(w["first"], w["last"]) for w in workers]
    assert (ranges[0][0], ranges[-1][1]) == (-1, 3)
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(ranges))
    alone, found = document(whole), document(results[-1])
    assert found["bytes"]["checkpoints_read"] == sum(w["bytes_read"] for w in workers)
    for key in ("noise_floor", "halvings", "numerics", "lens"):
        assert found[key] == alone[key], key
    assert not (Path(results[-1].path) / "spans").exists()


def test_workers_in_different_modes_cut_layers_of_different_sizes_at_the_same_places(pairs, tmp_path):
    """Each chooses its mode by what is free where it runs."""
    settings = {"num_hidden_layers": 6, "intermediate_size": 4000}  # of the first layer, as large as all others
    entry = entry_of(pairs("deepseek_v3", **settings), prompts=PROMPTS)
    whole = capture_pair(entry, str(tmp_path / "whole"))
    sent = []
    for index, mode in enumerate(("streamed", "sub-layer", "streamed")):
        relay = Relay(index, 3)
        relay.give(tuple(sent))
        result = capture_pair(entry.model_copy(update={"mode": mode}), str(tmp_path / "relay"), relay=relay)
        if index < 2:
            sent.append(send(relay.outbox))
    same_tables(whole, result)


def test_a_worker_reads_its_own_layers_and_no_others(pairs, tmp_path, monkeypatch):
    from capture import work

    ledgers = []
    opened = work.Work._open
    monkeypatch.setattr(work.Work, "_open", lambda self: (opened(self), ledgers.append(self.ledger))[0])
    entry = entry_of(pairs("llama", num_hidden_layers=4), mode="streamed", dtype="float32")
    run_relay(entry, tmp_path, 2)
    layers = [{int(k.split("layers.")[1].split(".")[0]) for k in one.reads if "layers." in k} for one in ledgers]
    assert layers == [{0, 1}, {2, 3}]


def test_a_parcel_is_the_same_whatever_order_its_source_has(monkeypatch):
    monkeypatch.setattr("capture.parcels.PART_BYTES", 7)
    monkeypatch.setattr(relays, "PART_BYTES", 7)
    tensors = {
        "a": torch.arange(5, dtype=torch.int32),
        "none": torch.empty(3, 0),
        "b": torch.randn(3, 2).to(torch.bfloat16),
        "c": torch.randn(4, 3).T,
        "d": torch.tensor(True),
    }
    turn = iter([list(tensors), list(reversed(tensors))])
    parcel = Parcel(lambda: {name: tensors[name] for name in next(turn)})
    parts = [parcel.part(i) for i in range(parcel.header.n_parts)]
    assert [len(p) for p in parts] == [7] * (parcel.header.nbytes // 7) + [parcel.header.nbytes % 7]
    got = unpack(parcel.header, iter(parts))
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("sizes", "count", "ranges"),
    [
        ([1, 1, 1, 1], 1, [(-1, 3)]),
        ([1, 1, 1, 1], 2, [(-1, 1), (2, 3)]),
        ([1, 1, 1, 1, 1], 3, [(-1, 1), (2, 2), (3, 4)]),
        ([10, 1, 1, 1], 2, [(-1, 0), (1, 3)]),
        ([1, 1, 1, 10], 3, [(-1, 1), (2, 2), (3, 3)]),  # each has a layer at least
        ([2, 2, 2, 2, 9, 9], 3, [(-1, 3), (4, 4), (5, 5)]),
        ([0, 0, 0], 3, [(-1, 0), (1, 1), (2, 2)]),
    ],
)
def test_layers_are_cut_into_ranges_of_about_equal_bytes(sizes, count, ranges):
    assert cut(sizes, count) == ranges


def test_more_workers_than_layers_are_refused(pairs, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=r"spans.workers is 5 and the models have 4 layers; set it to 4 or less"
    ):
        run_relay(entry_of(pairs("llama", num_hidden_layers=4)), tmp_path, 5)


def test_a_worker_that_waits_ends_when_it_is_asked_to(pairs, tmp_path):
    relay = Relay(1, 2)
    with pytest.raises(KeyboardInterrupt):
        capture_pair(entry_of(pairs("llama", num_hidden_layers=4)), str(tmp_path), relay=relay, stop=lambda: True)


def test_what_is_lost_is_told_by_whose_it_was(pairs, tmp_path):
    entry = entry_of(pairs("llama", num_hidden_layers=4))
    _, sent = run_relay(entry, tmp_path / "one", 2)

    def lost(span, part):
        raise LostError(span)

    relay = Relay(1, 2, fetch=lost)
    relay.give(tuple(sent))
    with pytest.raises(LostError, match="what span 0 handed over is lost"):
        capture_pair(entry, str(tmp_path / "other"), relay=relay)


def test_a_worker_goes_on_behind_what_an_earlier_one_committed_of_its_layers(pairs, tmp_path, monkeypatch):
    entry = entry_of(pairs("llama", num_hidden_layers=4), spans=Spans(layers=1), mode="streamed")
    whole = capture_pair(entry, str(tmp_path / "whole"))
    monkeypatch.setattr("capture.work.Work._write", lambda *_: pytest.fail("no room"))
    with pytest.raises(pytest.fail.Exception):
        run_relay(entry, tmp_path / "relay", 2)
    monkeypatch.undo()
    results, _ = run_relay(entry, tmp_path / "relay", 2)
    same_tables(whole, results[-1])
    first, second = document(results[-1])["workers"]
    assert (first["began_at"], second["began_at"]) == (2, 3)  # nothing is left of its layers; one of two
    assert first["bytes_read"] < second["bytes_read"]
