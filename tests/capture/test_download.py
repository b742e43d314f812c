"""Results that come from a device behind what makes them, simulated: nothing is read before it is there, and none is missing."""

import agree
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from simulated_streams import Cuda
from test_capture import captured, entry_of, expected

from capture import collector
from capture.config import Batching
from capture.download import WAITING, Behind
from capture.settings import Spans


class Late(Behind):
    """On a simulated stream, which copies when somebody waits for it; what is not there yet is no number."""

    def __init__(self, device=torch.device("cpu")):  # noqa: B008
        super().__init__(device, Cuda(late=True))
        self.puts = self.most = 0

    def put(self, tensors, use):
        self.puts += 1
        super().put(tensors, use)
        self.most = max(self.most, len(self.waiting))

    def _copied(self, x):
        here = torch.full(x.shape, float("nan") if x.dtype.is_floating_point else 1).to(x.dtype)
        self.cuda.main.ask(lambda: here.copy_(x))
        return here


@pytest.fixture
def late(monkeypatch):
    made = []
    monkeypatch.setattr(collector, "download_from", lambda device: made.append(Late()) or made[-1])
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batching": Batching(max_tokens=40, padding="right"), "noise_floor": True},
        {"spans": Spans(layers=1), "mode": "streamed"},
        {"spectrum": True, "mode": "streamed-2"},
    ],
)
def test_a_capture_is_the_same_however_late_its_results_come(changes, pairs, loaded, late, tmp_path, monkeypatch):
    slow, document = captured(entry_of(pairs("llama"), **changes), tmp_path / "late")
    assert late[0].puts > 5
    assert late[0].most > 1
    monkeypatch.undo()
    _, known = captured(entry_of(pairs("llama"), **changes), tmp_path / "plain")
    for table in agree.KEYS:
        files = [sorted((tmp_path / way).rglob(f"{table}*.parquet")) for way in ("late", "plain")]
        assert len(files[0]) == len(files[1]) > 0
        assert all(
            pq.read_table(a, partitioning=None).equals(pq.read_table(b, partitioning=None))
            for a, b in zip(*files, strict=True)
        )
    assert document["noise_floor"] == known["noise_floor"]
    if not changes:
        assert (
            agree.disagreements(expected(loaded("llama"), tiny.encode(tiny.PROMPTS)), agree.read_tables(slow.path))
            == []
        )


def test_results_are_used_in_order_and_few_are_on_their_way():
    lane, used = Late(), []
    for i in range(3 * WAITING):
        lane.put(
            [torch.tensor([float(i)]), torch.tensor([[i, i]]), torch.tensor(i + 0.5)],
            lambda here: used.append([x.tolist() for x in here]),
        )
    assert len(lane.waiting) == WAITING
    lane.settle()
    assert used == [[[float(i)], [[i, i]], i + 0.5] for i in range(3 * WAITING)]


def test_where_memory_is_short_results_come_one_by_one(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    lane, used = Late(), []
    monkeypatch.setattr(torch, "cat", full)
    lane.put([torch.tensor([1.0, 2.0]), torch.tensor(3)], lambda here: used.append([x.tolist() for x in here]))
    lane.settle()
    assert used == [[[1.0, 2.0], 3]]
