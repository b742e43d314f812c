"""Results in an object store: Arrow's own S3 client against a store that errs on order."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_store import KEY, SECRET, Store, running_store
from far import ID, Collecting, Far
from test_collect import check

import cluster.collect_follow as follow_module
from capture.attempt import check_output
from capture.config import load_config
from capture.errors import StoreError
from capture.layout import MARKER, RunDir
from capture.run import capture_pair
from capture.show import Show
from cluster.collect import Collector
from cluster.collect_source import StoreSource

ROOT = Path(__file__).parents[2]
ACCOUNT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)
    with running_store() as made:
        yield made


@pytest.fixture
def far(tmp_path: Path, store: Store) -> Far:
    """A head whose sweeps go to the store."""
    made = Far(tmp_path / "far")
    made.run = RunDir(store.uri("run"))
    return made


@pytest.fixture
def home(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "home"))


def collector(far: Far, home: RunDir) -> Collector:
    return Collector(StoreSource(far.run.out, None), home, Show(stream=io.StringIO(), live=False))


def prompts(pair: str = "one") -> str:
    return f"run/captures/pair={pair}/capture={ID}/prompts.parquet"


def check_store(store: Store, run: RunDir) -> None:
    """Every capture is what its marker says, and its marker came after all that it names."""
    made = store.made()
    for found in run.captures():
        place = found.path.removeprefix("results/")
        for item in found.marker["files"]:
            data = store.objects[f"{place}/{item['name']}"]
            assert (len(data), hashlib.sha256(data).hexdigest()) == (item["bytes"], item["sha256"])
            assert made.index(f"{place}/{item['name']}") < made.index(f"{place}/{MARKER}")


def test_a_capture_is_delivered_with_its_marker_last_and_comes_home_whole_and_once(
    far: Far, home: RunDir, store: Store
) -> None:
    for pair in ("one", "two", "three"):
        far.capture(pair)
    assert far.run.is_complete("one", ID)
    check_store(store, far.run)
    assert not [key for key in store.objects if key.endswith("/")], "a store needs no directories"
    made = collector(far, home)
    assert made.round().fetched == 3, "listings come page by page"
    check(home, ["one", "three", "two"])
    assert {r["state"] for r in home.manifest_rows()} == {"complete"}
    assert len(list(Path(home.root).glob("logs/*/*.log"))) == 3
    store.calls.clear()
    assert made.round().fetched == 0
    assert not [call for call in store.calls if ".parquet" in call]


def test_what_is_larger_than_a_part_is_there_whole_or_not_at_all(far: Far, store: Store) -> None:
    data = os.urandom(24 << 20)
    store.fault(r"PUT .*large\?partNumber=2", 403)
    with pytest.raises(StoreError, match="cannot write 'results/run/large'"):
        far.run.write_bytes(f"{far.run.root}/large", data)
    assert [call for call in store.calls if "large?partNumber=1" in call]
    assert store.objects == {}
    store.faults.clear()
    far.run.write_bytes(f"{far.run.root}/large", data)
    assert store.objects == {"run/large": data}


def test_a_store_that_says_busy_or_breaks_the_line_is_asked_again(far: Far, home: RunDir, store: Store) -> None:
    store.fault(r"PUT .*prompts", 503, times=2)
    store.fault(r"POST .*_COMPLETE\?uploads", 500, times=1)
    store.fault(r"POST .*manifest", "drop", times=1)
    store.fault(r"POST .*capture\.json\?uploads", 429, times=1)
    far.capture("one")
    assert not [f for f in store.faults if f.times > 0], "all of them came to pass"
    check_store(store, far.run)
    store.fault(r"GET .*list-type", 503, times=2)
    store.fault(r"GET .*prompts", "drop", times=1)
    store.fault(r"GET .*_COMPLETE", "hang", times=1)
    store.hang_s = 4  # longer than the client's patience with a line
    assert collector(far, home).round().fetched == 1
    check(home, ["one"])


def test_a_store_that_stays_broken_is_one_error_and_leaves_no_marker(far: Far, home: RunDir, store: Store) -> None:
    store.fault(r"PUT .*prompts", 500)
    with pytest.raises(StoreError, match=r"cannot write 'results/run/captures/pair=one/.*INTERNAL_FAILURE"):
        far.capture("one")
    assert not [key for key in store.objects if "captures/" in key]
    assert not far.run.is_complete("one", ID)
    assert collector(far, home).round().look.captures == []


def test_a_transfer_from_a_store_that_breaks_off_goes_on_where_it_was(far: Far, home: RunDir, store: Store) -> None:
    far.capture("one", rows=4000)
    total = len(store.objects[prompts()])
    store.fault(r"GET .*prompts", 403, after=1)  # at once; what is worth asking again is asked for six seconds
    with pytest.raises(StoreError, match="broke off"):
        collector(far, home).round()
    (part,) = Path(home.root).glob(".incoming/*/*/prompts.parquet")
    assert 0 < part.stat().st_size < total
    assert list(home.captures()) == []
    store.faults.clear()
    store.calls.clear()
    assert collector(far, home).round().fetched == 1  # as after a restart
    check(home, ["one"])
    assert len([c for c in store.calls if c.startswith("GET") and "prompts" in c]) <= (total - 1) // (1 << 20) + 1


def test_what_a_store_gives_is_held_against_its_checksums(far: Far, home: RunDir, store: Store) -> None:
    far.capture("bad")
    far.capture("good")
    data = store.objects[prompts("bad")]
    store.objects[prompts("bad")] = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    done = collector(far, home).round()
    assert list(done.left) == [f"bad ({ID})"]
    assert "checksum" in done.left[f"bad ({ID})"]
    check(home, ["good"])
    assert not list(Path(home.root).glob("captures/pair=bad/*/_COMPLETE"))


@pytest.mark.slow
def test_a_cluster_goes_down_once_all_is_at_home_from_the_store(
    far: Far, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "FIRST_PAUSE_S", 0.01)
    far.capture("one")
    far.note(("one", "complete", ID), out=far.run.out)
    store.fault(r"GET .*_COMPLETE", 503, times=32)  # more than a client asks by itself
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (0, 1)
    assert "trying again in" in run.said
    assert "which outlives the cluster; fetching from there" in run.said
    check(RunDir(str(tmp_path / "home")), ["one"])


@pytest.mark.parametrize(
    ("key", "bucket", "refused", "message"),
    [
        ("wrong", "results", "", "INVALID_ACCESS_KEY_ID"),
        (KEY, "elsewhere", "", "NO_SUCH_BUCKET"),
        (KEY, "results", "PUT", "ACCESS_DENIED"),
    ],
)
def test_a_store_that_cannot_be_used_is_said_before_any_work(
    store: Store, monkeypatch: pytest.MonkeyPatch, key: str, bucket: str, refused: str, message: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    if refused:
        store.fault(refused, 403)
    with pytest.raises(StoreError, match=message) as raised:
        check_output(RunDir(store.uri("run", bucket)))
    assert str(raised.value).count("choose another --out") + str(raised.value).count("cannot read the output") == 1


def test_a_store_that_refuses_is_not_waited_for_at_home(
    far: Far, home: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(StoreError, match="give this machine credentials"):
        collector(far, home).round()


def entry(tmp_path: Path) -> Path:
    """A config of one entry that commits a span after each layer."""
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["residual_compare"]
    pair = ROOT / "configs" / "pairs" / "pydoc"
    demo |= {"tokenizer": str(pair / "tokenizer"), "spans": {"layers": 1}, "prompts": demo["prompts"][:2]}
    demo["model_sweep"] = [{"name": "pydoc", "base_model": str(pair / "base"), "sft_model": str(pair / "sft")}]
    (tmp_path / "s3.yaml").write_text(yaml.safe_dump({"residual_compare": demo}))
    return tmp_path / "s3.yaml"


@pytest.mark.slow
def test_a_capture_whose_store_fails_it_at_the_end_goes_on_where_it_was(
    tmp_path: Path, store: Store, home: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = load_config(str(entry(tmp_path))).entries()
    store.fault(r"POST .*capture\.json\?uploads", 403)
    with pytest.raises(StoreError, match="ACCESS_DENIED"):
        capture_pair(one, store.uri("run"))
    assert not [key for key in store.objects if key.endswith(MARKER)]
    assert [key for key in store.objects if "/spans/" in key]
    store.faults.clear()
    caplog.set_level("INFO")
    assert capture_pair(one, store.uri("run")).state == "complete"
    assert "going on at layer" in caplog.text
    check_store(store, RunDir(store.uri("run")))
    assert not [key for key in store.objects if "/spans/" in key]
    Collector(StoreSource(store.uri("run"), None), home, Show(stream=io.StringIO(), live=False)).round()
    check(home, ["pydoc"])
    store.fault(r"_COMPLETE", 503)
    store.calls.clear()
    with pytest.raises(StoreError, match=r"cannot read .*_COMPLETE.*HTTP status 503"):
        capture_pair(one, store.uri("run"))
    assert not [call for call in store.calls if call.startswith(("PUT", "POST", "DELETE"))], "it is not made again"


@pytest.mark.slow
def test_a_sweep_into_a_store_is_complete_and_not_done_twice(tmp_path: Path, store: Store, home: RunDir) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAIRSCOPE_HOME": str(tmp_path / "ps")}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-m", "pairscope", "sweep", str(entry(tmp_path)), "--out", store.uri("run")]
    for said in ("1 of 1 complete", "nothing left to do"):
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
    run = RunDir(store.uri("run"))
    check_store(store, run)
    (row,) = run.manifest_rows()
    assert b"Device: cpu" in store.objects[f"run/{row['log']}"]
    Collector(StoreSource(store.uri("run"), None), home, Show(stream=io.StringIO(), live=False)).round()
    check(home, ["pydoc"])
