"""Weights straight from the hub: the numbers of weights on disk, bit for bit, in every mode; and a cache that only gets whole files."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from local_hub import Fault, LocalHub
from test_fp8 import make as make_fp8
from walked import CPU, open_pair, walk

from capture import fetch, hub, ranges, remote
from capture.checkpoint import StreamedModel
from capture.config import FOUR_PASSES, Entry
from capture.errors import CheckpointError, HubFailedError
from capture.files import resolve_model, resolve_tokenizer
from capture.footprint import MODES
from capture.layout import RunDir
from capture.ledger import Ledger
from capture.lockstep import Pair
from capture.progress import Progress
from capture.remote import Source
from capture.run import capture_pair, resolve

IDS = tiny.random_ids(3, 9).tolist()


@pytest.fixture
def at_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalHub]]:
    """`at_hub(paths)`: a hub that has the pair as org/base and org/sft."""
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    (tmp_path / "hub").mkdir()
    with LocalHub(tmp_path / "hub") as made, made.used_here(monkeypatch, tmp_path / "cache"):

        def serve(paths: Any) -> LocalHub:
            (tmp_path / "hub" / "org").symlink_to(paths.base.parent)
            return made

        yield serve
    assert not [t for t in threading.enumerate() if t.name.startswith(("fetch", "headers", "hash"))]


def open_remote(source: Source) -> Pair:
    ledger = Ledger()
    models = [
        StreamedModel(resolve_model(f"org/{label}", source=source).path, label=label, dtype="auto", device=CPU,
                      model_kwargs={}, ledger=ledger, source=source)
        for label in ("base", "sft")
    ]  # fmt: skip
    return Pair(*models, FOUR_PASSES)


def assert_same(got: Any, want: Any) -> None:
    for name, by_layer in want.items():
        for layer, states in by_layer.items():
            assert all(map(torch.equal, got[name][layer], states)), (name, layer)


def kept(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").glob("models--*/snapshots/*/*.safetensors"))


def entry_of(weights: str, **settings: Any) -> Entry:
    return Entry.model_validate(
        {"name": "tiny", "base_model": "org/base", "sft_model": "org/sft", "tokenizer": "org/base", "prompts": tiny.PROMPTS[:2],
         "device": "cpu", "weights": weights, "mode": "streamed", "noise_floor": False} | settings
    )  # fmt: skip


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.rglob("*.parquet") if p.parent.name.startswith("capture=")}


@pytest.mark.parametrize(("arch", "mode"), [*(("llama", mode) for mode in MODES), ("mixtral", "streamed")])
def test_every_mode_gives_the_states_of_weights_on_disk(
    arch: str, mode: str, pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    paths = pairs(arch, sharded=True)
    want, served = walk(open_pair(paths), IDS, mode=mode), at_hub(paths)
    source = Source(keep=False)
    try:
        pair = open_remote(source)
        assert_same(walk(pair, IDS, mode=mode), want)
        pair.close()
        assert source.fetcher.held == 0, "all that was announced was taken, or given back"
    finally:
        source.close()
    assert kept(tmp_path) == []
    assert not [r for r in served.seen("content") if r.range is None], "no file is downloaded"


@pytest.mark.parametrize("mode", ["streamed", "sub-layer"])
def test_fp8_weights_with_scales_and_experts_too(
    mode: str, tmp_path: Path, at_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capture.assemble.STRIP", 1 << 12)  # many strips of one tensor
    paths = make_fp8(
        "deepseek_v3", tmp_path / "pair", hidden_size=256, intermediate_size=384, moe_intermediate_size=128
    )
    want = walk(open_pair(paths), IDS, mode=mode)
    at_hub(paths)
    source = Source(keep=False)
    try:
        assert_same(walk(open_remote(source), IDS, mode=mode), want)
    finally:
        source.close()


@pytest.mark.parametrize("mode", ["streamed", "resident", "streamed-2"])
def test_every_byte_comes_once_and_few_wait_in_memory(
    mode: str, pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PART", 5_000)
    monkeypatch.setattr(fetch, "UNIT", 20_000)
    paths = pairs("llama", sharded=True)
    at_hub(paths)
    source = Source(keep=False)
    try:
        pair = open_remote(source)
        source.open(60_000)
        walk(pair, IDS, mode=mode)
        stored = sum(f.size for f in source.files.values())
        largest = max(20_000, pair.models["base"].head_weight.nbytes)
        assert 0.9 * stored < source.fetcher.fetched <= stored
        assert source.fetcher.peak <= 60_000 + largest
    finally:
        source.close()


def test_what_passes_is_kept_and_the_next_capture_asks_for_no_weights(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    served = at_hub(pairs("llama", sharded=True))
    served.faults = [
        Fault("cut", after=900, times=3), Fault("status", status=503, times=2), Fault("status", status=403),
        Fault("status", where="hub", part="safetensors", status=429),
    ]  # fmt: skip
    said: list[Progress] = []
    first = capture_pair(entry_of("cache"), str(tmp_path / "one"), progress=said.append)
    assert [p.here for p in said] == sorted(p.here for p in said), "once its weights have come they have"
    assert not any(p.here for p in said if p.stage == "open")
    assert said[-1].here
    assert not [f for f in served.faults if f.times]
    for label in ("base", "sft"):
        folder = next((tmp_path / "cache" / f"models--org--{label}" / "snapshots").iterdir())
        for name, path in served.files(f"org/{label}").items():
            assert (folder / name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "cache").rglob("*pairscope*"))
    served.requests.clear()
    said.clear()
    again = capture_pair(entry_of("download"), str(tmp_path / "two"), progress=said.append)
    assert all(p.here for p in said[1:]), "from the moment on that its files are found"
    assert served.seen("content") == []
    assert again.capture == first.capture, "the way that weights come is not in the id"
    assert tables(tmp_path / "two") == tables(tmp_path / "one") != {}
    record = json.loads((Path(first.path) / "capture.json").read_text())["from_the_hub"]
    assert (record["weights"], record["files"], record["files_kept"]) == ("cache", 10, 10)
    assert json.loads((Path(again.path) / "capture.json").read_text())["from_the_hub"] is None


def test_a_damaged_file_in_the_cache_is_told_with_what_has_it_fetched_again(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    """The cache takes it for whole, and asking again would give the same file."""
    at_hub(pairs("llama"))
    file = Path(resolve_model("org/base").path, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"is corrupt: .* remove it from the hub's cache and run again"):
        resolve_model("org/base")
    file.resolve().unlink()
    assert resolve_model("org/base").weight_bytes


def test_a_files_bytes_are_on_the_disk_before_it_has_its_name_in_the_cache(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is right from the beginning: after a power cut nothing else would tell that bytes are missing."""
    at_hub(pairs("llama"))
    synced: set[int] = set()
    sync, move, early = os.fsync, os.replace, []

    def syncing(fd: int) -> None:
        sync(fd)
        synced.add(os.fstat(fd).st_ino)

    def moving(source: Any, target: Any) -> None:
        if str(source).endswith(".pairscope") and os.stat(source).st_ino not in synced:
            early.append(source)
        move(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", moving)
    capture_pair(entry_of("cache"), str(tmp_path / "out"))
    assert kept(tmp_path)
    assert early == []


def test_wrong_bytes_end_the_capture_and_leave_nothing(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    """Not what was committed meanwhile either: the next attempt would go on from it, and never read those bytes again."""
    at_hub(pairs("llama"))
    entry = entry_of("cache", spans={"layers": 1})
    real = ranges.Ranges.read

    def spoilt(self: Any, file: Any, start: int, view: memoryview) -> None:
        real(self, file, start, view)
        if start > 300_000:
            view[7] ^= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges.Ranges, "read", spoilt)
        patch.setattr(fetch, "PART", 50_000)
        with pytest.raises(
            CheckpointError, match=r"'org/(base|sft)', 'model.safetensors': the bytes that came are not"
        ):
            capture_pair(entry, str(tmp_path / "out"))
    assert kept(tmp_path) == []
    assert not list((tmp_path / "cache").rglob("*.pairscope"))
    assert not RunDir(str(tmp_path / "out")).is_complete("tiny", resolve(entry_of("download")).capture)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    for out in ("out", "undisturbed"):
        capture_pair(entry, str(tmp_path / out))
    assert tables(tmp_path / "out") == tables(tmp_path / "undisturbed") != {}


def test_bytes_that_only_the_cache_wants_may_fail_to_come(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The model does not use them, and all that it uses was measured."""
    at_hub(pairs("llama"))
    monkeypatch.setattr(remote, "NEARLY", 0.0)

    def fail(*_: Any) -> None:
        raise CheckpointError("bytes 7 to 9 could not be read")

    monkeypatch.setattr(remote.Source, "_rest", fail)
    monkeypatch.setattr("capture.spool.Spool.missing", property(lambda _: [(7, 10)]))
    assert capture_pair(entry_of("cache"), str(tmp_path / "out")).state == "complete"
    assert "'org/base', 'model.safetensors' is not kept: bytes 7 to 9 could not be read" in caplog.text
    assert kept(tmp_path) == []


def test_what_an_ended_capture_had_kept_is_not_fetched_again(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_READ", 4096)  # these shards are no larger than a header may be
    served = at_hub(pairs("llama", num_hidden_layers=8, sharded=True))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(KeyboardInterrupt):
        capture_pair(entry_of("cache"), str(tmp_path / "out"), stop=stop)
    first = served.seen("content")
    assert kept(tmp_path) == []
    served.requests.clear()
    capture_pair(entry_of("cache"), str(tmp_path / "out"))
    total = sum(p.stat().st_size for label in ("base", "sft") for p in served.files(f"org/{label}").values() if p.suffix == ".safetensors")  # fmt: skip
    second = sum(min(r.range[1], 10**9) - r.range[0] + 1 for r in served.seen("content") if r.range)
    assert first
    assert second < 0.8 * total
    assert len(kept(tmp_path)) == len([p for label in ("base", "sft") for p in served.files(f"org/{label}") if p.endswith("safetensors")])  # fmt: skip


def test_small_files_and_weights_are_of_one_commit_though_the_hub_fails_between_them(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library then gives what the cache has of the branch, which may be an older commit."""
    copied = shutil.copytree(pairs("llama").base.parent, tmp_path / "pair")
    served = at_hub(SimpleNamespace(base=copied / "base"))
    old = resolve_model("org/base").revision
    shutil.copy(copied / "sft" / "model.safetensors", copied / "base" / "model.safetensors")
    new, real = served.commit("org/base"), hub._check_disk
    assert new != old

    def fail_next(*args: Any) -> None:
        real(*args)
        served.faults.append(Fault("status", where="hub", part="api/models/org/base", status=500))

    monkeypatch.setattr(hub, "_check_disk", fail_next)
    source = Source(keep=True)
    try:
        files = resolve_model("org/base", source=source)
        assert files.revision == new
        assert [f.commit for f in source.files.values()] == [new]
    finally:
        source.close()
    assert not [f for f in served.faults if f.times], "the hub failed between the two"


def test_a_hub_that_fails_before_the_small_files_have_come_is_told(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub]
) -> None:
    """The library then gives the folder as it is, without a word: with the config, and without a tokenizer's files."""
    served = at_hub(pairs("llama", sharded=True))
    for ask in (resolve_model, resolve_tokenizer, partial(resolve_model, source=Source(keep=False))):
        served.faults = [Fault("status", where="hub", part="/tree/", status=404)]
        with pytest.raises(
            HubFailedError, match=r"the hub did not answer for 'org/base'.*not all .* in the cache.*again"
        ):
            ask("org/base")
        assert not served.faults[0].times
    assert resolve_model("org/base").weight_bytes


@pytest.mark.parametrize("way", ["cache", "stream", "download"])
@pytest.mark.parametrize("says", ["in its answers for files", "no hash", "no size"])
def test_a_mirror_whose_lists_say_no_sizes_and_hashes(
    way: str, says: str, pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    served = at_hub(pairs("llama"))
    served.bare = True
    if says == "no hash":
        monkeypatch.setattr(served, "etag", lambda path: f"its-own-{path.parent.name}-{path.name}")
    if says == "no size":
        monkeypatch.setattr(
            "huggingface_hub.get_hf_file_metadata", lambda *_, **__: SimpleNamespace(size=None, etag=None)
        )
        if way == "stream":
            with pytest.raises(
                CheckpointError, match=r"'org/base': the hub does not say how large .*; set weights: download"
            ):
                capture_pair(entry_of(way), str(tmp_path / "out"))
            return
    assert capture_pair(entry_of(way), str(tmp_path / "out")).state == "complete"
    is_kept = way == "download" or (way == "cache" and says != "no hash")
    assert len(kept(tmp_path)) == 2 * is_kept
    assert ("gives no hash to check it by" in caplog.text) == (way == "cache" and says == "no hash")
    assert not list((tmp_path / "cache").rglob("*pairscope*"))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_were_not_kept_are_told_when_there_is_no_hub_any_more(
    sharded: bool, pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The cache has the small files alone, which look like a repository without weights."""
    at_hub(pairs("llama", sharded=sharded))
    capture_pair(entry_of("stream"), str(tmp_path / "out"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"'org/base' in .*in the hub's cache.* without HF_HUB_OFFLINE, what is miss"
    ):
        capture_pair(entry_of("stream"), str(tmp_path / "out"))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_streamed_is_known_without_the_hub(
    sharded: bool, pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    """For a sweep that looks what is complete."""
    made = at_hub(pairs("llama", sharded=sharded))
    done = capture_pair(entry_of("stream"), str(tmp_path / "out"))
    asked = len(made.requests)
    found = resolve(entry_of("stream"), download=False)
    assert (found.capture, found.weight_bytes) == (done.capture, 0)
    assert len(made.requests) == asked


def test_a_disk_that_is_too_small_keeps_nothing_and_the_capture_goes_on(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    at_hub(pairs("llama"))
    monkeypatch.setattr(hub, "_check_disk", lambda *_: None)
    monkeypatch.setattr(hub, "free_bytes", lambda: 10)
    made = capture_pair(entry_of("cache"), str(tmp_path / "out"))
    assert made.state == "complete"
    assert kept(tmp_path) == []
    assert "org/base is not kept, nor its hash checked" in caplog.text
    record = json.loads((Path(made.path) / "capture.json").read_text())["from_the_hub"]
    assert (record["files"], record["files_kept"]) == (2, 0), "of none the hash is known to be the hub's"


def test_quantized_weights_are_downloaded_first_or_refused_where_they_may_not_be(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    paths = tiny.make_pair("llama", tmp_path / "pair")
    config = json.loads((paths.base / "config.json").read_text())
    (paths.base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    served = at_hub(paths)
    for weights, source in (("stream", Source(keep=False)), ("cache", Source(keep=True))):
        if weights == "stream":
            with pytest.raises(
                CheckpointError, match="'org/base': weights quantized by gptq are read whole; set weights: download"
            ):
                resolve_model("org/base", source=source)
        else:
            assert not resolve_model("org/base", source=source).remote
            size = (paths.base / "model.safetensors").stat().st_size
            assert [r.range for r in served.seen("content")] == [(0, size - 1)]
        source.close()


def test_a_stand_in_takes_no_disk_and_goes_with_its_capture(
    pairs: Callable[..., Any], at_hub: Callable[..., LocalHub]
) -> None:
    at_hub(pairs("llama"))
    source = Source(keep=False)
    files = resolve_model("org/base", source=source)
    stand_in = Path(files.path) / "model.safetensors"
    assert stand_in.stat().st_size == (pairs("llama").base / "model.safetensors").stat().st_size
    assert stand_in.stat().st_blocks * 512 < 0.2 * stand_in.stat().st_size
    assert files.revision == resolve_model("org/base").revision
    source.close()
    assert not stand_in.exists()


def test_a_header_that_is_none_is_refused(tmp_path: Path, at_hub: Callable[..., LocalHub]) -> None:
    folder = tmp_path / "pair" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    at_hub(SimpleNamespace(base=folder))
    source = Source(keep=False)
    with pytest.raises(
        CheckpointError, match=r"'org/base', 'model.safetensors' is not a safetensors file \(1000 bytes\)"
    ):
        resolve_model("org/base", source=source)
    source.close()
