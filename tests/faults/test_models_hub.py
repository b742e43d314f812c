"""What a hub and a checkpoint can do wrong, over the real huggingface_hub and a hub on loopback."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from local_hub import Fault, LocalHub
from safetensors.torch import save_file

from capture import hub as ours
from capture import ranges
from capture.errors import CheckpointError, PairscopeError
from capture.files import resolve_model
from capture.keep import Keeper
from capture.remote import Source
from capture.spool import Spool

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A model of two shards of 1.5 MiB, large enough to be served by the content server in pieces."""
    made = tmp_path / "served" / "org" / "model"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weights = {shard: {f"{i}.weight": torch.full((384, 1024), float(i))} for i, shard in enumerate(SHARDS)}
    for shard, tensors in weights.items():
        save_file(tensors, made / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, tensors in weights.items() for key in tensors}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


@pytest.fixture
def hub(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's own pauses between tries
    with LocalHub(tmp_path / "served") as made, made.used_here(monkeypatch, tmp_path / "cache"):
        yield made


def refused(**options: Any) -> str:
    with pytest.raises(PairscopeError) as caught:
        resolve_model("org/model", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "status", "code", "says"),
    [  # with the code that the hub gives beside the status
        ("hub-401", 401, "RepoNotFound", "log in with `hf auth login`"),
        ("hub-403", 403, "GatedRepo", "accept its terms at"),
        ("hub-404", 404, "RepoNotFound", "check the name"),
        ("hub-401", 401, "", "org/model"),
        ("hub-403", 403, "", "org/model"),
        ("hub-404", 404, "", "org/model"),
        ("hub-429", 429, "", "429"),
        ("hub-5xx", 500, "", "500"),
        ("hub-5xx", 502, "", "502"),
        ("hub-5xx", 503, "", "503"),
    ],
)
def test_a_hub_that_refuses_is_one_line_with_the_status_and_later_all_is_well(
    hub: LocalHub, key: str, status: int, code: str, says: str, told: Any
) -> None:
    hub.faults = [
        Fault("status", where="hub", status=status, times=100, headers={"X-Error-Code": code} if code else {})
    ]
    said = refused()
    assert says in said
    hub.faults = []
    assert resolve_model("org/model").weights == SHARDS
    assert "For more information" not in said
    if code or key in ("hub-429", "hub-5xx"):
        told(key, sees=f"`CheckpointError: {shown(said)}`", again="nothing: no work had begun")


def shown(said: str) -> str:
    """What was said, as the page shows it: without addresses of the test's own, and not all of a long one."""
    return (
        re.sub(r"https?://127\.0\.0\.1:\d+[^\s']*", "<address>", said)
        .removesuffix(" as the test asked for")
        .replace("`", "")
    )


def test_a_shard_that_came_with_other_bytes_comes_again_and_the_second_time_is_refused(
    hub: LocalHub, repo: Path, tmp_path: Path, told: Any
) -> None:
    hub.faults = [Fault("wrong", part=SHARDS[1], times=2)]
    said = refused()
    assert f"'{SHARDS[1]}': the bytes that came are not those of the hub" in said
    assert "Run again" in said
    blobs = {p.name for p in (tmp_path / "cache").glob("models--org--model/blobs/*")}
    assert hub.sha256(repo / SHARDS[0]) in blobs
    assert hub.sha256(repo / SHARDS[1]) not in blobs
    files = resolve_model("org/model")
    assert len(hub.seen("content", SHARDS[0])) == 1, "what was right is kept"
    assert (Path(files.path) / SHARDS[1]).read_bytes() == (repo / SHARDS[1]).read_bytes()
    seen = "a warning, and the file comes again; `CheckpointError: '<repo>', '<shard>': the bytes that came are not those of the hub … Run again` where that brings other bytes too"
    told("shard-wrong", sees=seen, again="the file is downloaded")


def test_a_shard_that_came_with_other_bytes_once_is_downloaded_by_the_hubs_library(
    hub: LocalHub, repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("wrong", part=SHARDS[1])]
    files = resolve_model("org/model")
    assert "it is downloaded by the hub's own library" in caplog.text
    for shard in SHARDS:
        assert (Path(files.path) / shard).read_bytes() == (repo / shard).read_bytes()


def test_after_a_download_that_was_cut_for_good_only_what_is_missing_comes(
    hub: LocalHub, repo: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    hub.faults = [Fault("cut", part=SHARDS[1], after=0, times=100)]
    assert "run again, files that are whole are not fetched again" in refused()
    hub.faults = []
    files = resolve_model("org/model")
    assert len(hub.seen("content", SHARDS[0])) == 1
    for shard in SHARDS:
        assert (Path(files.path) / shard).read_bytes() == (repo / shard).read_bytes()
    told(
        "download-cut",
        sees="`CheckpointError: downloading '<repo>' failed …; run again, files that are whole are not fetched again`",
        again="files that were not whole are downloaded",
    )


def test_a_file_that_another_process_fetches_is_waited_for(
    hub: LocalHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, go_on = threading.Event(), threading.Event()

    def wait(seconds: float) -> None:
        waited.set()
        assert go_on.wait(60)

    monkeypatch.setattr("time.sleep", wait)
    blobs = tmp_path / "cache" / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / f"{hub.sha256(repo / SHARDS[1])}.pairscope").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as pool:
            files = pool.submit(resolve_model, "org/model")
            try:
                assert waited.wait(60)
                assert len(hub.seen("content", SHARDS[0])) == 1
                assert hub.seen("content", SHARDS[1]) == []
            finally:
                other.close()  # as if it were killed
                go_on.set()
            path = Path(files.result().path)
    assert (path / SHARDS[1]).read_bytes() == (repo / SHARDS[1]).read_bytes()
    assert len(hub.seen("content", SHARDS[1])) == 1


def test_a_commit_that_changes_other_files_brings_no_weights_again(hub: LocalHub, repo: Path) -> None:
    first = resolve_model("org/model")
    (repo / "tokenizer_config.json").write_text("{}")
    for ask in (resolve_model, partial(resolve_model, source=Source(keep=True))):
        assert ours.download_bytes("org/model", None, allow_pickle=False, token=None) < 1000
        files = ask("org/model")
        assert files.revision != first.revision
        assert not files.remote
        assert (Path(files.path) / SHARDS[1]).read_bytes() == (repo / SHARDS[1]).read_bytes()
        assert len(hub.seen("content", "model-0000")) == 2
        (repo / "tokenizer_config.json").write_text('{"a": 1}')


def test_a_shard_that_another_process_fetched_meanwhile_is_not_fetched_again(
    hub: LocalHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Keeper._whole

    def and_another(keeper: Keeper, spool: Spool) -> None:
        monkeypatch.setattr(Keeper, "_whole", whole)
        whole(keeper, spool)
        folder, files = ours.model_without_weights(
            "org/model", None, allow_pickle=False, token=None, check_config=lambda config: None
        )
        assert Keeper().fetch((file, folder) for file in files) == 1

    monkeypatch.setattr(Keeper, "_whole", and_another)
    resolve_model("org/model")
    assert [len(hub.seen("content", shard)) for shard in SHARDS] == [1, 1]
    assert not list((tmp_path / "cache").glob("models--*/blobs/*.pairscope*"))


def begun(repo: Path) -> tuple[Spool, int]:
    """The first shard, with 1 MB of it there, and its size."""
    folder, files = ours.model_without_weights(
        "org/model", None, allow_pickle=False, token=None, check_config=lambda config: None
    )
    spool = Spool.open(files[0], folder)
    assert spool is not None
    spool.write(0, memoryview((repo / SHARDS[0]).read_bytes()[:1_000_000]))
    return spool, files[0].size


def test_what_a_process_had_of_a_file_when_it_was_killed_is_gone_on_with(
    hub: LocalHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed while this one fetches another file, so that nobody writes the file any more once this one is through."""
    spool, size = begun(repo)
    spool.save()
    whole = Keeper._whole

    def and_killed(keeper: Keeper, other: Spool) -> None:
        spool._close()
        whole(keeper, other)

    monkeypatch.setattr(Keeper, "_whole", and_killed)
    path = Path(resolve_model("org/model").path)
    assert [r.range for r in hub.seen("content", SHARDS[0])] == [(1_000_000, size - 1)]
    assert (path / SHARDS[0]).read_bytes() == (repo / SHARDS[0]).read_bytes()
    assert not list((tmp_path / "cache").glob("models--*/blobs/*.pairscope*"))


def test_what_came_of_a_file_that_the_library_then_downloads_is_not_left_behind(
    hub: LocalHub, repo: Path, tmp_path: Path
) -> None:
    spool, _ = begun(repo)
    spool.pause()
    hub.faults = [Fault("whole", part=SHARDS[0])]
    path = Path(resolve_model("org/model").path)
    assert [r.range for r in hub.seen("content", SHARDS[0])][1:] == [None], "the library's"
    assert (path / SHARDS[0]).read_bytes() == (repo / SHARDS[0]).read_bytes()
    assert not list((tmp_path / "cache").glob("models--*/blobs/*.pairscope*"))


def test_a_line_that_gives_a_file_in_small_pieces_gives_all_of_it(
    hub: LocalHub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    hub.faults = [Fault("cut", part=SHARDS[1], after=100_000, times=100)]
    files = resolve_model("org/model")
    assert len(hub.seen("content", SHARDS[1])) == 1 + len((repo / SHARDS[1]).read_bytes()) // 100_000
    assert (Path(files.path) / SHARDS[1]).read_bytes() == (repo / SHARDS[1]).read_bytes()


def test_a_download_cut_now_and_then_is_whole_in_the_end(
    hub: LocalHub, repo: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # 10 MiB are put down at a time
    hub.faults = [Fault("cut", part="model-0000", after=300_000, times=3)]
    files = resolve_model("org/model")
    asked = [r.range for r in hub.seen("content", "model-0000")]
    assert len(asked) == 2 + 3
    assert sum(r is not None and r[0] > 0 for r in asked) == 3  # what had come was not asked for again
    assert (Path(files.path) / SHARDS[0]).read_bytes() == (repo / SHARDS[0]).read_bytes()
    told("download-flaps", sees="nothing", again="nothing: what had come is not asked for again")


def test_a_disk_too_small_is_said_before_a_byte_of_weights_comes(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda path: usage(2_000_000, 0, 2_000_000))
    assert "GiB more on disk" in refused()
    assert hub.seen("content", "model-0000") == []
    told(
        "hub-disk",
        sees="`CheckpointError: '<repo>' needs … GiB more on disk, … free; make room, or set HF_HOME to a larger disk`",
        again="nothing: no work had begun",
    )


@pytest.mark.parametrize("way", ["download", "cache"])
def test_what_is_there_of_a_file_needs_no_room_on_the_disk(
    hub: LocalHub, repo: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    spool, size = begun(repo)
    spool.pause()
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda path: usage(0, 0, 2 * size - 900_000))
    source = Source(keep=True) if way == "cache" else None
    resolve_model("org/model", source=source)
    if source is not None:
        source.close()
    assert "is not kept" not in caplog.text


@pytest.mark.parametrize("left", [0, 5, 900_000])
def test_a_shard_cut_in_the_cache_is_named_before_work_starts(hub: LocalHub, left: int, told: Any) -> None:
    files = resolve_model("org/model")
    shard = Path(files.path) / SHARDS[1]
    with shard.resolve().open("r+b") as stream:
        stream.truncate(left)
    text = refused()
    assert SHARDS[1] in text
    told("shard-truncated", sees="one `CheckpointError` that names the file", again="nothing: no work had begun")


def test_a_hub_that_is_gone_leaves_what_is_in_the_cache(
    hub: LocalHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    known = resolve_model("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert resolve_model("org/model") == known
    assert "cannot be reached" in caplog.text
    told("hub-gone", sees="the log warns `the hub cannot be reached …; trying the cache`", again="nothing")


def test_an_index_that_leads_out_of_the_directory_is_refused(repo: Path, tmp_path: Path) -> None:
    shutil.copy(repo / SHARDS[0], tmp_path / "outside.safetensors")
    for name in (
        "../../../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "",
        ".",
        "a/../../x.safetensors",
    ):
        index = {"metadata": {}, "weight_map": {"0.weight": name}}
        (repo / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            resolve_model(str(repo))


NOT_JSON = [b"", b"{", b"null", b"[]", b"1", b"[" * 100_000, b"\xff"]
NO_INDEX = [
    b"{}",
    b'{"weight_map": 1}',
    b'{"weight_map": {"a": 1}}',
    b'{"weight_map": {}}',
    b'{"weight_map": {"a": []}}',
]


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", c) for c in NOT_JSON] + [("model.safetensors.index.json", c) for c in NOT_JSON + NO_INDEX],
)
def test_odd_json_in_a_checkpoint_is_one_line(repo: Path, file: str, content: bytes) -> None:
    (repo / file).write_bytes(content)
    with pytest.raises(PairscopeError) as caught:
        resolve_model(str(repo))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [b"", b"{", b"null", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"[" * 50_000, b"\xff" * 20,
                                    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}',
                                    b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [9, "y"]}}'])  # fmt: skip
def test_odd_headers_of_weights_are_one_line(repo: Path, header: bytes) -> None:
    for size in (len(header), 1 << 62):
        (repo / SHARDS[0]).write_bytes(size.to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError) as caught:
            resolve_model(str(repo))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"<html>log in to our network</html>", b"{", b"{}", b"[]", b"null", b"[" * 100_000,
                                    b'{"id": "org/model", "sha": "a", "siblings": [5]}'])  # fmt: skip
def test_what_is_no_hub_is_said_to_be_none(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LocalHub
) -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://me:planted@127.0.0.1:{server.server_address[1]}")
        for ask in (refused, lambda: refused_by(ours.download_bytes)):
            assert (said := ask()).startswith("http://***@127.0.0.1")
            assert "answers for 'org/model' what no hub says" in said
        server.shutdown()


def refused_by(ask: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        ask("org/model", None, allow_pickle=False, token=None)
    return str(caught.value)
