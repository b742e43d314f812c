"""`ray` itself, as typed: what is wrong ends in one line that says what to do, an exit code, and nothing rented or forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_server import Fake, running_fake
from provider_stage import HEAD_TAGS, ROOT, config, node_config, on_laptop

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0.05,0.05") as found:
        yield found


@pytest.fixture
def fake(server: Fake) -> Iterator[Fake]:
    """Nothing is rented and nothing goes wrong at the beginning; `fake.bill()` also has what was before."""
    yield server
    server.control("faults", [])
    for line in server.live():
        server.control(f"vanish/{line['id']}")
    server.control("forget_keys")


def ray(
    fake: Fake, folder: Path, change: dict[str, Any], words: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """words: what is typed after `ray`; FILE stands for the cluster's config."""
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config(**change)))
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder), "VAST_URL": fake.url,
           "VAST_API_KEY": "full-rights", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment}  # fmt: skip
    return subprocess.run(
        ["ray", *(str(file) if word == "FILE" else word for word in words)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({}, {"VAST_API_KEY": "made-up"}, "VastKeyError: list instances: Vast does not know this API key"),
        ({}, {"VAST_API_KEY": "no-new-keys"}, "VAST_HEAD_API_KEY"),
        ({"max_price_per_hour": 0.1}, {}, "CapError: 1x RTX 4090"),
        ({"offers": "hi"}, {}, "ConfigError: provider: 'offers' is a mapping"),
    ],
)
def test_bad_input_is_one_line_and_rents_nothing(
    fake: Fake, tmp_path: Path, change: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    done = ray(fake, tmp_path, change, ["up", "-y", "FILE"], **environment)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert fake.live() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({}, {"VAST_API_KEY": ""}, "VastKeyError: no Vast API key found; make one at"),
        (
            {},
            {"VAST_API_KEY": "read-only", "VAST_HEAD_API_KEY": "full-rights"},
            "the API key lacks the right to do that",
        ),
        ({"offers": {"image": "x", "min_inet_down": 9000}}, {}, "excluded most by min_inet_down 9000 Mb/s: 6"),
        (
            {"image_versions": {"ray": "2.1.0"}},
            {},
            "VersionError: this machine differs from what provider: image_versions",
        ),
        ({"max_total_dollars": -1}, {}, "'max_total_dollars' must be a number above 0"),
    ],
)
def test_more_bad_input_is_one_line_and_rents_nothing(
    fake: Fake, tmp_path: Path, change: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    test_bad_input_is_one_line_and_rents_nothing(fake, tmp_path, change, environment, said)


@pytest.mark.slow
def test_a_second_ray_up_that_would_change_the_head_and_one_of_somebody_else_are_refused(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rent_head(fake, tmp_path, monkeypatch)
    more_disk = {"offers": config()["provider"]["offers"] | {"disk_gb": 300}}
    (tmp_path / "elsewhere").mkdir()
    for folder, change, said in (
        (tmp_path, more_disk, "cannot be changed in this: rtx4090: disk_gb was 200, is 300"),
        (tmp_path / "elsewhere", {}, "is in use by a cluster that was not made from this machine"),
    ):
        done = ray(fake, folder, change, ["up", "-y", "FILE"])
        assert done.returncode != 0
        assert said in " ".join((done.stdout + done.stderr).split())
        assert "Traceback" not in done.stdout + done.stderr
        assert len(fake.live()) == 1


def test_options_before_the_command_do_not_hide_it(fake: Fake, tmp_path: Path) -> None:
    wrong = {"image_versions": {"python": "3.9"}}
    done = ray(fake, tmp_path, wrong, ["--logging-level", "info", "up", "-y", "FILE"])
    assert done.returncode != 0
    assert "VersionError" in done.stdout + done.stderr
    assert fake.live() == []


@pytest.mark.parametrize("words", [["exec", "--start", "FILE", "true"], ["attach", "--start", "FILE"]])
def test_no_command_but_ray_up_rents_a_head(fake: Fake, tmp_path: Path, words: list[str]) -> None:
    done = ray(fake, tmp_path, {}, words)
    assert done.returncode != 0
    assert f"`ray {words[0]} --start` would rent one without asking" in done.stdout + done.stderr
    assert "`ray up " in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert fake.live() == []


def rent_head(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A head as `ray up` in this home leaves it; its id."""
    monkeypatch.setenv("PAIRSCOPE_HOME", str(folder / ".pairscope"))
    monkeypatch.setenv("VAST_API_KEY", "full-rights")
    monkeypatch.setenv("VAST_URL", fake.url)
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = laptop.non_terminated_nodes({})
    return str(head)


def test_ray_down_ends_a_head_that_vasts_listing_leaves_out(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rent_head(fake, tmp_path, monkeypatch)
    fake.fault("list", "no_rows", times=1000)
    done = ray(fake, tmp_path, {}, ["down", "-y", "FILE"])
    assert fake.live() == [], done.stdout + done.stderr
    assert done.returncode == 0
    assert "Vast lists no instance" in done.stdout + done.stderr


def test_ray_down_that_cannot_show_a_node_to_be_gone_fails_and_keeps_all_that_is_needed_to_end_it(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = rent_head(fake, tmp_path, monkeypatch)
    fake.fault("list", "no_rows", times=1000)
    fake.fault("destroy", "403", times=1000)
    done = ray(fake, tmp_path, {}, ["down", "-y", "FILE"])
    assert done.returncode != 0
    assert "VastKeyError: destroy instance" in done.stdout + done.stderr
    folder = tmp_path / ".pairscope/clusters/pairscope"
    assert head in json.loads((folder / "state.json").read_text())["seen"]
    assert (folder / "id_ed25519").exists()
    fake.control("faults", [])
    assert ray(fake, tmp_path, {}, ["down", "-y", "FILE"]).returncode == 0
    assert fake.live() == []
    assert not (folder / "id_ed25519").exists()
