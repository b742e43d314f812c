"""The hub that tests use: the real library finds in it what it finds in the real one, and what is asked to go wrong does."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, LocalHub

from capture.errors import CheckpointError
from capture.files import resolve_model

NAME = "model.safetensors"


@pytest.fixture
def hub(pairs: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    (tmp_path / "org").symlink_to(pairs("llama").base.parent)
    with LocalHub(tmp_path) as made, made.used_here(monkeypatch, tmp_path / "cache"):
        yield made


def read(url: str, first: int | None = None, last: int | None = None) -> tuple[int, bytes]:
    headers = {} if first is None else {"Range": f"bytes={first}-{last}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.status, answer.read()


def test_the_real_library_downloads_a_model_whole(hub: LocalHub) -> None:
    files = resolve_model("org/base")
    assert files.revision == hub.commit("org/base")
    for name, path in hub.files("org/base").items():
        assert (Path(files.path) / name).read_bytes() == path.read_bytes()
    assert [r.name for r in hub.seen("content")] == [NAME]


def test_the_real_library_hears_what_is_missing_and_who_may_not(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no model 'org/none'"):
        resolve_model("org/none")
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        resolve_model("org/base", "v2")
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match="gated"):
        resolve_model("org/base")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve_model("org/base").weights == (NAME,)
    assert [r.authorization for r in hub.seen("content")] == [None]


def test_ranges_and_addresses_that_expire(hub: LocalHub) -> None:
    data, url = hub.files("org/base")[NAME].read_bytes(), f"{hub.url}/org/base/resolve/main/{NAME}"
    assert read(url) == (200, data)
    assert read(url, 5, 9) == (206, data[5:10])
    signed = hub.signed("org/base", NAME)
    assert read(signed, 0, 0) == (206, data[:1])
    hub.expire()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        read(signed)
    with pytest.raises(urllib.error.HTTPError, match="416"):
        read(url, len(data), len(data) + 1)


def test_faults_come_as_often_as_was_said(hub: LocalHub) -> None:
    data, url = hub.files("org/base")[NAME].read_bytes(), f"{hub.url}/org/base/resolve/main/{NAME}"
    hub.faults = [Fault("status", status=429, headers={"Retry-After": "7"}), Fault("wrong")]
    with pytest.raises(urllib.error.HTTPError, match="429") as caught:
        read(url)
    assert caught.value.headers["Retry-After"] == "7"
    wrong = read(url)[1]
    assert len(wrong) == len(data)
    assert wrong != data
    hub.faults = [Fault("cut", after=100)]
    with pytest.raises(Exception, match="100 bytes read"):
        read(url)
    assert read(url) == (200, data)


def test_all_answers_share_the_bandwidth(hub: LocalHub) -> None:
    url = hub.signed("org/base", NAME)
    size = len(read(url)[1])
    hub.bucket.rate = size / 0.2
    began = time.monotonic()
    for _ in range(3):
        read(url)
    assert time.monotonic() - began > 0.5  # never faster than said; a moment's worth is given at once
