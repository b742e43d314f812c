"""Weights that go to a device on a stream of their own, simulated: whoever uses them finds them there, and nothing is written over
what is still in use."""

import pytest
import reference
import tiny
import torch
from simulated_streams import Late
from walked import open_pair, walk

from capture import checkpoint, download, footprint, upload
from capture.checkpoint import StreamedModel
from capture.errors import CheckpointError

IDS = tiny.random_ids(2, 9)


@pytest.fixture
def late(monkeypatch):
    """All models' weights go the way to a GPU, in small pieces."""
    made = Late()
    monkeypatch.setattr(checkpoint, "upload_to", lambda device: made)
    monkeypatch.setattr(StreamedModel, "is_view", lambda self, group: False)
    monkeypatch.setattr(upload, "STAGE", 4096)
    return made


@pytest.mark.parametrize("mode", footprint.MODES)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "gemma2", "deepseek_v3"])
def test_states_are_those_of_plain_transformers_however_late_copies_arrive(arch, mode, pairs, loaded, late):
    want = reference.residuals(loaded(arch), IDS)
    got = walk(open_pair(pairs(arch)), IDS.tolist(), mode=mode)
    assert late.copies > 20
    for name, by_layer in want.items():
        for layer, state in by_layer.items():
            assert torch.equal(torch.stack(got[name][layer]), state), (name, layer)


def test_nothing_is_there_for_those_who_do_not_wait(pairs, late, monkeypatch):
    monkeypatch.setattr(Late, "wait", lambda self, key: None)
    with pytest.raises(CheckpointError, match=r"its embedding of token .* holds NaN"):  # what has not come yet
        walk(open_pair(pairs("llama")), IDS.tolist(), mode="streamed")


SOURCES = {
    "large": torch.arange(5000.0),
    "a number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "rows": torch.arange(3000.0).view(30, 100),
    "long rows": torch.arange(6000.0).view(2, 3000),
    "columns of a larger one": torch.arange(6000.0).view(60, 100)[:, 10:50],
    "bytes of eight bits": torch.arange(5000.0).view(50, 100).to(torch.float8_e4m3fn),
    "of another dtype": torch.arange(5000, dtype=torch.float64).view(50, 100),
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_tensors_of_every_kind_are_copied_piece_by_piece(name, strided, monkeypatch):
    monkeypatch.setattr(upload, "STAGE", 4096)
    source, lane = SOURCES[name], Late()
    for dtype in (torch.float32, torch.bfloat16, source.dtype):
        if strided and source.dim() == 2:
            out = torch.zeros(source.shape[0], 2 * source.shape[1]).to(dtype)[:, : source.shape[1]]
        else:
            out = torch.zeros(source.shape).to(dtype)
        for _ in range(5):  # more than there is pinned memory for
            lane.fill(out, source)
        lane.arriving("weights")
        lane.wait("weights")
        assert torch.equal(out.float(), source.to(dtype).float())


def test_pinned_memory_is_not_written_before_it_has_been_copied(monkeypatch):
    monkeypatch.setattr(upload, "STAGE", 4096)
    lane, outs = Late(), [torch.zeros(700) for _ in range(40)]
    for i, out in enumerate(outs):
        lane.fill(out, torch.full((700,), float(i)))
    assert sum(t.numel() for t, _ in lane._stages) == upload.STAGES * 4096
    lane.arriving("weights")
    lane.wait("weights")
    assert [float(out.min()) for out in outs] == [float(out.max()) for out in outs] == list(range(40))


def test_without_pinned_memory_copies_wait_for_themselves(monkeypatch):
    asked = []
    monkeypatch.setattr(Late, "_pinned", lambda self, nbytes: asked.append(nbytes))
    lane = Late()
    for _ in range(20):
        lane.fill(out := torch.zeros(50), torch.ones(50))
        assert out.all()
    assert lane.copies == 0
    assert len(asked) == 1  # and not for every weight


def test_all_can_be_copied_in_turn(monkeypatch):
    monkeypatch.setenv(upload.ONE_STREAM, "1")
    device = torch.device("cuda")
    assert type(upload.upload_to(device)) is upload.Upload
    assert type(download.download_from(device)) is download.Download


def test_what_the_library_makes_in_its_own_threads_is_in_order_with_the_copies():
    lane, seen = Late(late=True), []
    with lane.on_stream():
        with lane.off_stream():
            lane.cuda.current_stream().ask(lambda: seen.append("the library's"))
        lane.cuda.current_stream().ask(lambda: seen.append("a comparison"))
    lane.arriving("weights")
    lane.wait("weights")
    lane.cuda.main.run(len(lane.cuda.main.asked))
    assert seen == ["the library's", "a comparison"]


def test_weights_are_not_begun_before_those_that_made_room_for_them_have_been_used():
    lane, seen = Late(late=True), []
    lane.cuda.main.ask(lambda: seen.append("layer 0"))
    lane.leaving("weights of layer 0", [])
    lane.left()
    room = lane.room()
    lane.cuda.main.ask(lambda: seen.append("layer 1"))
    lane.leaving("weights of layer 1", [])
    lane.left()
    with lane.on_stream(room):
        assert seen == ["layer 0"]


def test_a_layer_waits_for_its_own_weights_and_not_for_the_next_ones():
    lane, first, second = Late(late=True), torch.zeros(10), torch.zeros(10)
    for key, out in (("first", first), ("second", second)):
        lane.fill(out, torch.ones(10))
        lane.arriving(key)
    lane.wait("first")
    lane.cuda.main.run(1)
    assert first.all()
    assert not second.any()
