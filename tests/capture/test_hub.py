"""Checkpoints from the hub, over a huggingface_hub that is made up: nothing here touches the network."""

from __future__ import annotations

import errno
import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub as hub
import pytest
import torch
import transformers.utils.hub  # noqa: F401  reads HfApi when it is imported, so before that is replaced
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from capture import hub as ours
from capture.errors import CheckpointError, UnsupportedModelError
from capture.files import resolve_model, resolve_tokenizer
from capture.keep import Keeper

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """One repository, and a cache: answers model_info, hf_hub_download and snapshot_download, and keeps what was asked."""

    def __init__(self, root: Path) -> None:
        self.remote, self.cache = root / "remote", root / "cache" / "snapshots" / COMMIT
        self.remote.mkdir(parents=True)
        self.patterns: list[str] = []
        self.revisions: list[str | None] = []
        self.fails: dict[str, Exception] = {}  # call -> what it raises
        save_file({"a.weight": torch.ones(2, 2)}, self.remote / "model.safetensors")
        (self.remote / "config.json").write_text(json.dumps({"model_type": "llama"}))
        for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "README.md", "pytorch_model.bin"):
            (self.remote / name).write_text("{}")
        for name in ("original/consolidated.00.pth", "original/params.json", "onnx/model.onnx"):
            (self.remote / name).parent.mkdir(exist_ok=True)
            (self.remote / name).write_text("{}")

    def _raise(self, call: str) -> None:
        if call in self.fails:
            raise self.fails[call]

    def model_info(self, repo: str, *, revision: str | None, files_metadata: bool, token: Any) -> SimpleNamespace:
        self._raise("model_info")
        assert files_metadata
        self.revisions.append(revision)
        files = [p for p in self.remote.rglob("*") if p.is_file()]
        siblings = [
            SimpleNamespace(
                rfilename=str(p.relative_to(self.remote)), size=p.stat().st_size, lfs=None, blob_id="0" * 40
            )
            for p in files
        ]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(self, repo: str, name: str, *, revision: str, token: Any) -> str:
        self._raise("hf_hub_download")
        assert revision == COMMIT
        return str(self.remote / name)

    def snapshot_download(
        self,
        repo: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
        token: Any = None,
    ) -> str:
        if local_files_only:
            if not all((self.cache / name).exists() for name in allow_patterns):
                raise errors.LocalEntryNotFoundError("not cached")
            return str(self.cache)
        self._raise("snapshot_download")
        self.revisions.append(revision)
        self.patterns = allow_patterns
        for name in allow_patterns:
            self.cache.mkdir(parents=True, exist_ok=True)
            (self.cache / name).write_bytes((self.remote / name).read_bytes())
        return str(self.cache)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path)
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    monkeypatch.setattr(hub, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name, revision: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def no_ranges(*_: Any) -> int:
        raise CheckpointError("the server sends no ranges")

    monkeypatch.setattr(
        Keeper, "fetch", no_ranges
    )  # so that the library does all: tests/faults has a server for the rest
    return made


def http_error(kind: type[errors.HfHubHTTPError], text: str = "no") -> errors.HfHubHTTPError:
    return kind(text, response=SimpleNamespace(headers={}, request=None))


def refused(error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        resolve_model("org/model", **options)
    assert "\n" not in str(caught.value)
    assert "org/model" in str(caught.value)
    return str(caught.value)


def test_only_what_is_read_is_downloaded_and_the_commit_is_the_revision(fake: FakeHub) -> None:
    files = resolve_model("org/model")
    assert (files.source, files.revision, files.path) == ("hub", COMMIT, str(fake.cache))
    assert files.weights == ("model.safetensors",)
    assert sorted(fake.patterns) == [
        "config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_shards_are_those_of_the_index(fake: FakeHub) -> None:
    (fake.remote / "model.safetensors").rename(fake.remote / "model-00001-of-00001.safetensors")
    save_file({"z": torch.ones(1)}, fake.remote / "consolidated.safetensors")
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (fake.remote / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model("org/model").weights == ("model-00001-of-00001.safetensors",)
    assert "consolidated.safetensors" not in fake.patterns


def test_what_comes_is_of_the_commit_that_was_asked_about_and_the_cache_knows_its_branch_later(fake: FakeHub) -> None:
    """A branch may move while weights come: then the second of two questions by its name would bring all of another commit."""
    for _ in range(2):
        resolve_model("org/model", "v2")
    assert fake.revisions == ["v2", COMMIT] * 2
    refs = fake.cache.parents[1] / "refs"
    assert (refs / "v2").read_text() == COMMIT
    resolve_model("org/model", COMMIT)
    resolve_model("org/model")
    assert {p.name: p.read_text() for p in refs.iterdir()} == {"v2": COMMIT, "main": COMMIT}


def test_a_cache_that_cannot_be_told_where_a_branch_is_serves_all_the_same(fake: FakeHub) -> None:
    """One that may only be read, whose files were fetched by their commit, has all that is needed."""
    resolve_model("org/model", COMMIT)
    refs = fake.cache.parents[1] / "refs"
    refs.write_text("as good as no permission")
    assert resolve_model("org/model").revision == COMMIT
    refs.unlink()
    resolve_model("org/model")
    assert [p.name for p in refs.iterdir()] == ["main"]


def test_a_format_that_cannot_be_read_is_refused_before_the_download(fake: FakeHub) -> None:
    (fake.remote / "model.safetensors").unlink()
    assert "hub model 'org/model': only pickled weights" in refused()
    assert fake.patterns == []


def test_code_of_its_own_is_refused_before_the_download(fake: FakeHub) -> None:
    (fake.remote / "config.json").write_text('{"model_type": "odd_one", "auto_map": {}}')
    assert "runs code of its own" in refused(UnsupportedModelError)
    assert fake.patterns == []


def test_offline_or_without_download_the_cache_is_taken(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing is to be downloaded" in refused(download=False)
    resolve_model("org/model")
    fake.fails = {"model_info": AssertionError("asked the hub")}
    assert resolve_model("org/model", download=False).revision == COMMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model").revision == COMMIT
    (fake.cache / "model.safetensors").unlink()
    assert "no weights" in refused()
    (fake.cache / "config.json").unlink()
    assert "nor in the hub's cache, and HF_HUB_OFFLINE is set" in refused()


def test_without_a_network_the_cache_is_taken_and_that_is_said(fake: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    fake.fails = {"model_info": errors.HTTPError("name resolution failed")}
    assert "the hub cannot be reached (HTTPError: name resolution failed)" in refused()
    fake.fails = {}
    resolve_model("org/model")
    fake.fails = {"model_info": ConnectionError("refused")}
    assert resolve_model("org/model").revision == COMMIT
    assert "the hub cannot be reached for 'org/model' (ConnectionError); trying the cache" in caplog.text


def test_the_real_library_s_cache_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeHub(tmp_path / "made")
    repo = tmp_path / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((made.remote / name).read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model").path == str(snapshot)
    assert resolve_model("org/model", COMMIT).revision == COMMIT
    assert "at revision 'v2' is neither a directory here nor in the hub's cache" in refused(revision="v2")
    with pytest.raises(CheckpointError, match="'a//b' is neither a directory here nor a name on the hub"):
        resolve_model("a//b")


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        ("hf_hub_download", http_error(errors.GatedRepoError), "https://huggingface.co/org/model and log in with `hf auth login`"),
        ("model_info", http_error(errors.RepositoryNotFoundError), "no model 'org/model' on the hub, or it is private"),
        ("model_info", http_error(errors.RevisionNotFoundError), "has no revision 'v2' on the hub"),
        ("model_info", http_error(errors.HfHubHTTPError, "429\ntoo many"), "the hub refused 'org/model': HfHubHTTPError: 429 too many"),
        ("snapshot_download", errors.LocalEntryNotFoundError("Got: 503"), "the hub did not answer for 'org/model', and not all of it is in the cache"),
        ("model_info", ImportError("the 'socksio' package is not installed"), "'org/model' here: ImportError: the 'socksio' package is not installed; install that, or name an HTTP proxy"),
        ("model_info", errors.HFValidationError("bad"), "neither a directory here nor a name on the hub"),
        ("snapshot_download", OSError(errno.ENOSPC, "full"), "the disk is full while downloading"),
        ("snapshot_download", PermissionError(errno.EACCES, "denied"), "the hub's cache cannot be written"),
        ("snapshot_download", errors.HTTPError("reset"), "downloading 'org/model' failed: HTTPError: reset; run again"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    fake: FakeHub, call: str, error: Exception, expected: str
) -> None:
    fake.fails = {call: error}
    assert expected in refused(revision="v2")


def test_a_disk_that_is_too_small_is_said_before_the_download(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda path: usage(100, 90, 10))
    assert "needs 0.0 GiB more on disk" in refused()
    assert fake.patterns == []
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name, revision: "/cached")
    assert resolve_model("org/model").revision == COMMIT  # all is there: nothing more is needed


def test_a_tokenizer_of_its_own_needs_small_files_only(fake: FakeHub) -> None:
    assert resolve_tokenizer("org/model") == str(fake.cache)
    assert "model.safetensors" not in fake.patterns
    assert "tokenizer.json" in fake.patterns


def test_what_is_still_to_be_downloaded_is_known_without_downloading_it(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {p.name: p.stat().st_size for p in fake.remote.iterdir() if p.is_file()}
    read = ("config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert ours.download_bytes("org/model", None, allow_pickle=False, token=None) == sum(sizes[n] for n in read)
    assert fake.patterns == []
    cached = ("model.safetensors",)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name, revision: "/x" if name in cached else None)
    left = ours.download_bytes("org/model", None, allow_pickle=False, token=None)
    assert left == sum(sizes[n] for n in read if n not in cached)
    fake.fails = {"model_info": http_error(errors.GatedRepoError)}
    with pytest.raises(CheckpointError, match="is gated"):
        ours.download_bytes("org/model", None, allow_pickle=False, token=None)
