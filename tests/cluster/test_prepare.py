"""A node's weights: fetched once, in turn with the other nodes, with room for them, then read without the hub."""

from __future__ import annotations

import errno
import os
import random
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from capture import files, hub
from capture import run as capture_run
from capture.config import Entry
from capture.errors import CheckpointError, HubFailedError
from capture.progress import Progress
from cluster import prepare as prepare_module
from cluster import prepare_disk
from cluster.prepare import overrun, prepare, wants_login
from cluster.prepare_files import cache_bytes
from cluster.prepare_gate import LONGEST_PAUSE_S, SILENT_S, Gate
from cluster.vast.settings import HUB_LOGIN, for_head

usage = namedtuple("usage", "total used free")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_fifty_nodes_begin_one_after_the_other_and_some_at_a_time() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    rng = random.Random(1)
    asks = {f"node{i}": clock.now for i in range(50)}  # when each asks next
    ends: dict[str, float] = {}
    began: list[float] = []
    most = n_asked = 0
    while asks or ends:
        clock.now = min([*asks.values(), *ends.values()])
        for who in [w for w, at in ends.items() if at <= clock.now]:
            gate.leave(who)
            del ends[who]
        for who in [w for w, at in asks.items() if at <= clock.now]:
            n_asked += 1
            wait = gate.ask(who)
            if wait:
                asks[who] = clock.now + wait * rng.uniform(1.0, 1.3)
            else:
                del asks[who]
                began.append(clock.now)
                ends[who] = clock.now + rng.uniform(20, 60)
        most = max(most, len(ends))
    assert len(began) == 50
    assert most <= 16
    assert min(b - a for a, b in pairwise(began)) >= 1.0
    assert began[-1] - began[0] < 50 / 16 * 60 * 1.5, "waiting costs no more than a few downloads"


def test_a_place_is_kept_by_asking_and_lost_by_silence() -> None:
    clock = Clock()
    gate = Gate(at_once=1, clock=clock)
    assert gate.ask("a") == 0
    clock.now += SILENT_S - 1
    assert gate.ask("a") == 0
    clock.now += SILENT_S - 1
    assert gate.ask("b") > 0
    clock.now += 2
    assert gate.ask("b") == 0
    assert gate.ask("a") > 0


def test_a_hub_that_says_too_much_holds_everybody_back_longer_each_time() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    gate.ask("a")
    first = gate.too_much("a")
    assert gate.too_much("b") == first, "several nodes that hear it at once count once"
    assert gate.ask("c") == first
    pauses = [first]
    for _ in range(6):
        clock.now += pauses[-1]
        gate.ask("a")
        clock.now += 1
        pauses.append(gate.too_much("a"))
    assert pauses == sorted(pauses)
    assert pauses[1] == 2 * pauses[0]
    assert pauses[-1] == LONGEST_PAUSE_S
    clock.now += pauses[-1] + LONGEST_PAUSE_S + 1
    assert gate.too_much("a") == first, "after a calm it begins anew"


class FakeHub:
    """What capture.hub is asked for, and what it answers. refuses: what each next look at a model raises first."""

    def __init__(self) -> None:
        self.refuses: list[Exception] = []
        self.fetched: list[str] = []
        self.tokens: list[str | None] = []
        self.bytes = 10 * prepare_disk.GIB

    def download_bytes(self, repo: str, revision: str | None, *, allow_pickle: bool, token: Any) -> int:
        self.tokens.append(os.environ.get("HF_TOKEN"))
        if self.refuses:
            raise self.refuses.pop(0)
        return self.bytes

    def model_snapshot(self, repo: str, revision: str | None, **more: Any) -> Path:
        self.fetched.append(repo)
        return Path("/nowhere")

    def model_without_weights(self, repo: str, revision: str | None, **more: Any) -> tuple[Path, list[Any]]:
        self.fetched.append(f"small files of {repo}")
        return Path("/nowhere"), []

    def resolve_tokenizer(self, tokenizer: str, revision: str | None, **more: Any) -> str:
        self.fetched.append(f"tokenizer {tokenizer}")
        return "/nowhere"


def hub_error(kind: type[HfHubHTTPError], status: int) -> CheckpointError:
    error = CheckpointError(f"the hub said {status}")
    error.__cause__ = kind("no", response=SimpleNamespace(headers={}, request=None, status_code=status))  # type: ignore[arg-type]
    return error


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub()
    monkeypatch.setattr(hub, "download_bytes", made.download_bytes)
    monkeypatch.setattr(hub, "model_snapshot", made.model_snapshot)
    monkeypatch.setattr(hub, "model_without_weights", made.model_without_weights)
    monkeypatch.setattr(files, "resolve_tokenizer", made.resolve_tokenizer)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: os.environ.get("HF_TOKEN"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", lambda path: usage(0, 0, 100 * prepare_disk.GIB))
    monkeypatch.setattr(prepare_module, "ask", lambda method, *args: method(*args))
    monkeypatch.setattr(prepare_module, "_sleep", lambda seconds, stop: None)
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "pairscope"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return made


class NoWait(Gate):
    """A gate through which everybody goes at once."""

    token: str | None = None

    def ask(self, who: str, early: bool = False) -> float:
        self.heard[who] = 0.0
        return 0.0

    def login(self) -> str | None:
        return self.token


def entry(base: str = "org/base", sft: str = "org/sft", tokenizer: str = "org/sft", weights: Any = "download") -> Entry:
    return Entry(name="e", base_model=base, sft_model=sft, tokenizer=tokenizer, prompts=("a",), weights=weights)


def run(one: Entry, gate: Gate | None = None) -> list[Progress]:
    said: list[Progress] = []
    for stream in prepare(one, gate or NoWait(), said.append, lambda: False)[1]:
        stream.close()
    return said


def test_both_models_and_the_tokenizer_are_fetched_and_then_the_hub_is_let_alone(fake: FakeHub) -> None:
    gate = NoWait()
    run(entry(), gate)
    assert fake.fetched == ["org/base", "org/sft", "tokenizer org/sft"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE is True
    assert gate.heard == {}, "the place is given back"


def test_a_process_asks_the_hub_again_for_its_next_entry(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of the worker")
    seen = []

    def captured(one: Entry, out: str, **more: Any) -> str:
        seen.append((os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE, os.environ.get("HF_TOKEN")))
        raise CheckpointError("not this one")

    monkeypatch.setattr(prepare_module, "find_gate", NoWait)
    monkeypatch.setattr(capture_run, "capture_pair", captured)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            prepare_module.capture_prepared(entry(), "out")
        assert "HF_HUB_OFFLINE" not in os.environ
        assert constants.HF_HUB_OFFLINE is False
        assert os.environ["HF_TOKEN"] == "of the worker"
    assert seen == [("1", True, None)] * 2


def test_directories_need_nothing_and_no_turn(fake: FakeHub, tmp_path: Path) -> None:
    run(entry(str(tmp_path), str(tmp_path), str(tmp_path)), None)
    assert fake.fetched == []
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_directories_with_a_tokenizer_of_the_hub_stay_online(fake: FakeHub, tmp_path: Path) -> None:
    run(entry(str(tmp_path), str(tmp_path), "org/tokenizer"), None)
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_hub_that_is_overrun_is_asked_again_after_a_pause_for_all(fake: FakeHub) -> None:
    gate = NoWait()
    paused: list[str] = []
    gate.too_much = lambda who: paused.append(who) or 5.0  # type: ignore[method-assign,func-returns-value]
    fake.refuses = [hub_error(HfHubHTTPError, 429), hub_error(HfHubHTTPError, 503)]
    run(entry(), gate)
    assert len(paused) == 2
    assert fake.fetched[:2] == ["org/base", "org/sft"]


def test_a_hub_that_is_overrun_in_the_middle_of_its_answers_is_asked_again_too(fake: FakeHub) -> None:
    """What the library was told lies behind its own error then, or it says nothing of it."""
    hidden = CheckpointError("the hub did not answer")
    hidden.__cause__ = LocalEntryNotFoundError("not in the cache")
    hidden.__cause__.__cause__ = hub_error(HfHubHTTPError, 429).__cause__
    fake.refuses = [hidden, HubFailedError("the hub did not answer")]
    run(entry(), NoWait())
    assert fake.fetched[:2] == ["org/base", "org/sft"]


def test_a_hub_that_stays_overrun_is_given_up_and_its_place_given_back(fake: FakeHub) -> None:
    gate = NoWait()
    fake.refuses = [hub_error(HfHubHTTPError, 429) for _ in range(99)]
    with pytest.raises(CheckpointError, match="said 429"):
        run(entry(), gate)
    assert gate.heard == {}


def test_the_heads_login_is_taken_only_where_a_model_asks_for_one_and_not_kept(fake: FakeHub) -> None:
    gate = NoWait()
    gate.token = "hf_secret"
    run(entry(), gate)
    assert set(fake.tokens) == {None}
    fake.refuses = [hub_error(GatedRepoError, 403)]
    run(entry(), gate)
    assert fake.tokens[-1] == "hf_secret"
    assert "HF_TOKEN" not in os.environ


def test_a_gated_model_without_any_login_is_said_at_once(fake: FakeHub) -> None:
    error = hub_error(GatedRepoError, 403)
    fake.refuses = [error]
    assert wants_login(error)
    assert not overrun(error)
    with pytest.raises(CheckpointError, match="said 403"):
        run(entry())
    assert fake.fetched == []


def test_a_disk_too_small_for_both_models_is_said_before_any_download(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", lambda path: usage(0, 0, 15 * prepare_disk.GIB))
    with pytest.raises(CheckpointError, match=r"need 20.0 GiB more on disk and 2 to spare, .* has 15.0 GiB free"):
        run(entry())
    assert fake.fetched == []


def test_what_is_there_of_a_models_files_needs_no_room_on_the_disk(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.bytes = 3 << 20
    part = in_cache(tmp_path / "cache", "org/base") / "blobs" / "bb.pairscope"
    part.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(prepare_disk, "SPARE_BYTES", 0)
    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", lambda path: usage(0, 0, 5 << 20))
    run(entry())
    assert fake.fetched[:2] == ["org/base", "org/sft"]


@pytest.mark.parametrize("weights", ["stream", "cache"])
def test_where_weights_come_later_small_files_are_fetched_and_the_hub_stays_in_reach(
    fake: FakeHub, weights: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", lambda path: usage(0, 0, 15 * prepare_disk.GIB))
    gate = NoWait()
    gate.token = "hf_secret"
    fake.refuses = [hub_error(GatedRepoError, 403)]
    run(entry(weights=weights), gate)
    assert fake.fetched == ["small files of org/base", "small files of org/sft", "tokenizer org/sft"]
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["HF_TOKEN"] == "hf_secret", "addresses are asked for while the capture goes on"
    assert ("and not kept" in caplog.text) is (weights == "cache")


def test_the_heads_login_is_forgotten_once_the_capture_has_ended(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = NoWait()
    gate.token = "hf_secret"
    fake.refuses = [hub_error(GatedRepoError, 403)]
    monkeypatch.setattr(prepare_module, "find_gate", lambda: gate)
    monkeypatch.setattr("capture.run.capture_pair", lambda *_, **__: os.environ.get("HF_TOKEN"))
    assert prepare_module.capture_prepared(entry(weights="stream"), "/nowhere") == "hf_secret"
    assert "HF_TOKEN" not in os.environ


def in_cache(cache: Path, repo: str) -> Path:
    """A model as the hub's library keeps it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(snapshot.name)
    (folder / "blobs" / "aa").write_text("weights")
    (snapshot / "model.safetensors").symlink_to(folder / "blobs" / "aa")
    return folder


def test_a_repository_at_two_revisions_counts_once_in_what_has_come(fake: FakeHub, tmp_path: Path) -> None:
    in_cache(tmp_path / "cache", "org/base")
    once = cache_bytes([("org/base", "step1")])
    assert once == len("weights")
    assert cache_bytes([("org/base", "step1"), ("org/base", "step2")]) == once


@pytest.mark.parametrize("rented", [True, False])
def test_a_rented_node_makes_room_by_what_nobody_uses_and_no_other_machine_does(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rented: bool
) -> None:
    cache = tmp_path / "cache"
    done, used, wanted = (in_cache(cache, repo) for repo in ("org/done", "org/used", "org/base"))
    if rented:
        (tmp_path / "pairscope" / "mesh").mkdir(parents=True)
        (tmp_path / "pairscope" / "mesh" / "node.json").write_text("{}")
    free = lambda path: usage(0, 0, (5 if done.exists() else 30) * prepare_disk.GIB)  # noqa: E731
    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", free)
    with prepare_disk.in_use("org/used"):
        if rented:
            run(entry())
            assert fake.fetched[:2] == ["org/base", "org/sft"]
        else:
            with pytest.raises(CheckpointError, match="rent with a larger disk_gb"):
                run(entry())
    assert done.exists() is not rented
    assert used.exists()
    assert wanted.exists()


def test_one_entry_of_a_node_downloads_at_a_time(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def wait(seconds: float, stop: Any) -> None:
        order.append("waited")
        held.__exit__(None, None, None)

    monkeypatch.setattr(prepare_module, "_sleep", wait)
    held = prepare_disk.one_at_a_time()
    assert held.__enter__()
    said = run(entry())
    assert order == ["waited"]
    assert said[0].message == "waiting for another entry's download on this node"
    assert fake.fetched


def test_a_cache_on_a_file_system_without_locks_holds_nobody_up(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def wait(*_: Any) -> None:
        raise AssertionError("it waits for nobody")

    monkeypatch.setattr(prepare_disk.fcntl, "flock", none)
    monkeypatch.setattr(prepare_module, "_sleep", wait)
    run(entry())
    assert fake.fetched
    with prepare_disk._nobody_uses("org/base") as free:
        assert not free, "who uses it cannot be told"


def test_a_cache_that_may_only_be_read_is_read(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(path: Any, *more: Any, **kinds: Any) -> Any:
        if str(path).startswith(constants.HF_HUB_CACHE):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, *more, **kinds)

    opened = open
    monkeypatch.setattr(prepare_disk, "open", writes, raising=False)
    monkeypatch.setattr(Path, "write_text", writes)
    run(entry(), NoWait(sweep="this one"))
    assert fake.fetched


def test_a_stop_ends_the_waiting(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        prepare_module._sleep(60, lambda: True)


def test_a_login_that_is_mounted_goes_to_the_head_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert Gate().login() is None
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hf_secret\n")
    assert Gate().login() == "hf_secret"
    mounts = {HUB_LOGIN: HUB_LOGIN, "~/pairscope/capture": "capture"}
    config = for_head({"file_mounts": mounts, "provider": {}}, "a key", "an owner")
    assert config["file_mounts"] == {"~/pairscope/capture": "capture"}
