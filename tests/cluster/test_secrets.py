"""Planted secrets appear nowhere after a sweep, and files that hold one are their owner's alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_server import wait_for
from local_hub import Fault, LocalHub
from secrets_search import VARIABLES, Planted, modes

from capture.config import load_config
from capture.errors import ConfigError
from capture.layout import RunDir
from cluster.vast import keys
from cluster.vast.container import environment, start_script

DRIVER = """
import logging, os, sys
logging.basicConfig(level=logging.DEBUG)
from capture.attempt import run_entry
from capture.config import load_config
from capture.layout import RunDir
entry = load_config(sys.argv[1]).entries()[0]
print(repr(entry), entry, entry.as_json())
row, outcome = run_entry(entry, RunDir(sys.argv[2]), say=print, progress=print)
print(row, outcome)
"""


@pytest.fixture
def planted() -> Planted:
    return Planted()


def test_the_search_finds_what_is_planted(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_bytes(b"x" * ((1 << 22) - 5) + planted.environment["HF_TOKEN"].encode())
    assert planted.found([tmp_path], {"said": "nothing"}) == [f"HF_TOKEN in {tmp_path}/a/log"]
    assert planted.found([], {"said": f"a {planted.environment['VAST_API_KEY']}"}) == ["VAST_API_KEY in said"]
    assert planted.found([tmp_path], allowed=[tmp_path / "a" / "log"]) == []
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "input()", planted.environment["HF_TOKEN"]], stdin=subprocess.PIPE
    )
    try:
        assert wait_for(planted.in_arguments) == [f"HF_TOKEN in /proc/{sleeper.pid}/cmdline"]
    finally:
        sleeper.communicate(b"\n")


@pytest.mark.parametrize("works", [True, False])
def test_no_secret_is_left_by_a_capture_whether_it_works_or_not(
    planted: Planted, tmp_path: Path, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "capture"))
    from tiny import make_pair

    pair = make_pair("llama", tmp_path / "pair")
    planted.add("model_kwargs", "planted-in-the-config-0123456789")
    if not works:
        (pair.sft / "model.safetensors").write_bytes(b"cut")
    config = {
        "base_model": str(pair.base), "sft_model": str(pair.sft), "prompts": ["a b"], "device": "cpu",
        "model_kwargs": {"token": planted.environment["model_kwargs"]},
        "tokenizer_kwargs": {"token": planted.environment["model_kwargs"]},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps({"residual_compare": config}))
    with planted.watched() as seen:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path / "c.yaml"), str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | planted.environment | {"HF_HUB_OFFLINE": "1"}, cwd=Path(__file__).parents[2], timeout=300,
        )  # fmt: skip
    said = done.stdout
    assert ("'state': 'complete'" in said) == works, said
    assert planted.found([tmp_path / "out"], {"what was printed": said}) == []
    assert seen == []


def test_a_login_in_the_hub_s_address_is_shown_nowhere(planted: Planted, tmp_path: Path) -> None:
    """As a mirror's may be; the client's errors quote the address."""
    (tmp_path / "served" / "org" / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "served" / "org" / "model" / name).write_text('{"model_type": "llama"}')
    config = {"base_model": "org/model", "sft_model": "org/model", "prompts": ["a b"], "device": "cpu"}
    (tmp_path / "c.yaml").write_text(json.dumps({"residual_compare": config}))
    planted.add("endpoint", "planted-in-the-address")
    with LocalHub(tmp_path / "served") as hub:
        hub.faults = [Fault("status", where="hub", status=503, times=100)]
        login = {
            "HF_ENDPOINT": hub.url.replace("//", f"//me:{planted.environment['endpoint']}@"),
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", DRIVER.replace("DEBUG", "WARNING"), str(tmp_path / "c.yaml"), str(tmp_path / "out")], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | login | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}, cwd=Path(__file__).parents[2], timeout=300,
        )  # fmt: skip
        assert hub.seen("hub")
    assert "***@127.0.0.1" in done.stdout
    assert "***@127.0.0.1" in next(tmp_path.glob("out/manifest/*.json")).read_text()
    assert planted.found([tmp_path / "out"], {"what was printed": done.stdout}) == []


def test_an_output_with_a_login_in_its_address_is_refused(planted: Planted) -> None:
    secret = planted.environment["AWS_SECRET_ACCESS_KEY"]
    with pytest.raises(ConfigError, match=r"'s3://\*\*\*@bucket/run\?region=x' names a login") as caught:
        RunDir(f"s3://AKID:{secret}@bucket/run?region=x")
    assert secret not in str(caught.value)


def test_no_secret_is_shown_by_errors_and_texts_of_a_config(planted: Planted, tmp_path: Path) -> None:
    secret = planted.environment["HF_TOKEN"]
    for broken in (
        f'{{"prompts": ["x"], "model_kwargs": {{"token": "{secret}", "device_map": "x"}}}}',
        f'{{"prompts": ["x"], "model_kwargs": {{"token": "{secret}"}}, "lens": {{"norm": "no"}}}}',
        f'{{"prompts": ["x"], "model_kwargs": "{secret}"}}',
        f'{{"prompts": ["x"], "model_kwargs": {{"token": {{"a": "{secret}"}}, "x": "\x01"}}}}',
    ):
        (tmp_path / "c.yaml").write_text(f'{{"residual_compare": {broken}}}')
        with pytest.raises(Exception) as caught:
            load_config(tmp_path / "c.yaml", {}).entries()
        assert secret not in str(caught.value)
        assert type(caught.value).__module__.startswith("capture.")
    for variable in ("RESIDUAL_MODEL_KWARGS", "RESIDUAL_TOKENIZER_KWARGS"):
        (tmp_path / "c.yaml").write_text("residual_compare: {prompts: [x]}")
        with pytest.raises(Exception) as caught:
            load_config(tmp_path / "c.yaml", {variable: f"{{'token': '{secret}'"})
        assert secret not in str(caught.value)


def test_a_container_is_created_without_a_secret(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in planted.environment.items():
        monkeypatch.setenv(name, value)
    made = environment(2, api="https://x", deadline=1, silence_s=60, owner="o", launch="l", request="r")
    assert planted.found([], {"environment": json.dumps(made), "onstart": start_script()}) == []
    assert not set(made) & set(VARIABLES)


def test_a_client_of_vast_shows_its_key_nowhere(planted: Planted, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("vastai")
    from cluster.vast.api import Vast
    from cluster.vast.errors import VastError

    caplog.set_level(logging.DEBUG)
    key = planted.environment["VAST_API_KEY"]
    client = Vast(key, "http://127.0.0.1:9", sleep=lambda seconds: None)
    with pytest.raises(VastError) as caught:
        client.instances()
    texts = {
        "error": str(caught.value),
        "repr": repr(client),
        "log": caplog.text,
        "cause": repr(caught.value.__cause__),
    }
    assert planted.found([], texts) == []


def test_files_of_secrets_are_their_owner_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys.make_missing(tmp_path / "clusters" / "c")
        keys.write_secret(tmp_path / "clusters" / "c" / keys.API_KEY, "x")
    finally:
        os.umask(before)
    folder = tmp_path / "clusters" / "c"
    assert modes(folder, [keys.SSH_KEY, keys.MESH_KEY, keys.TOKEN, keys.API_KEY]) == []
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / keys.TOKEN).chmod(0o644)
    assert len(modes(folder, [keys.TOKEN])) == 1  # or the line above would show nothing
