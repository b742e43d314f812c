"""What `ray up` says before it asks: the price, or what stands in the way. Nothing is rented in any of these."""

from __future__ import annotations

import re
import shutil
import time
import types
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fake_server import Fake, wait_for
from provider_stage import HEAD_TAGS, config, node_config, on_laptop, ray_up

from capture.machine import checks
from cluster.vast import before_up
from cluster.vast.cli import vast as command
from cluster.vast.errors import VersionError
from cluster.vast.locked import versions

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


@pytest.fixture
def running(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cluster that is up; its head's id."""
    laptop, _ = ray_up(monkeypatch)
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    return str(head)


def refused(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any] | None = None) -> str:
    with pytest.raises(click.ClickException) as caught:
        ray_up(monkeypatch, content)
    return str(caught.value)


def on_laptop_knowing(head: str) -> Any:
    laptop = on_laptop()
    assert laptop.non_terminated_nodes({}) == [head]
    return laptop


def test_price_and_limits_are_shown(fake: Fake, monkeypatch: Any) -> None:
    _, shown = ray_up(monkeypatch)
    assert "1x RTX 4090 (24 GiB each), $0.441/h on demand" in shown[0]
    assert shown[0].endswith("; traffic, which is not in the limits, for 60 GB: $0.12")
    assert shown[1] == "While entries wait: up to 3 more of type rtx4090, now $0.441/h each."
    assert "$6/h for all nodes, $40 in all, 12 hours" in shown[2]
    assert fake.live() == []


@pytest.mark.parametrize(
    ("local", "said"),
    [
        ("none/such", r"no '.*none/such', which is to be mounted at '~/data' .*in the folder"),
        ("folder", r"'.*folder/below/astray', which is to be mounted at '~/data', cannot be read"),
        (5, r"mounted at '~/data' is a path of this machine, not 5"),
    ],
)
def test_a_mounted_file_that_cannot_be_read_is_told_before_anything_is_rented(
    fake: Fake, tmp_path: Path, monkeypatch: Any, local: str | int, said: str
) -> None:
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "below" / "astray").symlink_to("nowhere")
    content = config()
    content["file_mounts"]["~/data"] = str(tmp_path / local) if isinstance(local, str) else local
    assert re.search(said, refused(monkeypatch, content))
    assert on_laptop(content).non_terminated_nodes({}) == [], "other commands than `ray up` work"
    assert fake.live() == []


def test_a_machine_without_rsync_rents_none_that_it_could_not_set_up(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("ssh", "ssh-keygen"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or pytest.skip("no ssh client"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(before_up, "PROGRAMS", ("ssh", "rsync"))
    assert refused(monkeypatch) == (
        "ConfigError: there is no rsync on this machine, and without it no rented one can be set up: install it, then run `ray up` again"
    )
    assert fake.live() == []


def test_what_ray_up_needs_of_this_machine_is_what_doctor_looks_for() -> None:
    assert set(before_up.PROGRAMS) <= {check.name for check in checks()}


def test_a_key_that_ssh_would_not_use_rents_no_machine(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    on_laptop()
    for key in (tmp_path / "laptop" / "clusters" / "pairscope").glob("*_ed25519"):
        key.chmod(0o777)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    assert "id_ed25519' can be read by others" in refused(monkeypatch)
    assert fake.live() == []


def test_a_worker_type_that_nobody_offers_is_told_and_is_no_obstacle(fake: Fake, monkeypatch: Any) -> None:
    content = config()
    content["available_node_types"]["h200"]["max_workers"] = 2
    warned: list[str] = []
    monkeypatch.setattr(before_up.cli_logger, "warning", lambda text, *a, **_: warned.append(text.format(*a)))
    _, shown = ray_up(monkeypatch, content)
    assert len(shown) == 3
    assert "node type 'h200': nobody offers 1x H200 or H200 NVL" in warned[0]


def test_another_command_than_ray_up_is_not_held_up(fake: Fake, monkeypatch: Any) -> None:
    monkeypatch.setattr(before_up, "ray_command", lambda: "down")
    assert on_laptop(config(max_price_per_hour=0.1)).non_terminated_nodes({"ray-node-type": "head"}) == []


def test_no_key_at_all_says_where_to_get_one(fake: Fake, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("VAST_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = refused(monkeypatch)
    assert said.startswith("VastKeyError: no Vast API key found")
    assert "manage-keys" in said


def test_a_key_that_vast_does_not_know_is_told(fake: Fake, monkeypatch: Any) -> None:
    monkeypatch.setenv("VAST_API_KEY", "made-up")
    assert "does not know this API key" in refused(monkeypatch)


def test_a_price_above_the_cap_names_both(fake: Fake, monkeypatch: Any) -> None:
    said = refused(monkeypatch, config(max_price_per_hour=0.1))
    assert "$0.441/h" in said
    assert "max_price_per_hour 0.1" in said


def test_a_machine_above_the_cap_does_not_stand_before_one_below_it(fake: Fake, monkeypatch: Any) -> None:
    cheap_work, below = {"dph_base": 0.50, "inet_down_cost": 0.0}, {"dph_base": 0.30, "inet_down_cost": 0.02}
    fake.control("offers", [cheap_work, below])
    assert "$0.541/h" in ray_up(monkeypatch)[1][0], "the cheapest for the work"
    warned: list[str] = []
    monkeypatch.setattr(before_up.cli_logger, "warning", lambda text, *a, **_: warned.append(text.format(*a)))
    laptop, shown = ray_up(monkeypatch, config(max_price_per_hour=0.45))
    assert "$0.341/h" in shown[0]
    assert "No workers for now" in warned[0], "beside the head there is no room for another"
    assert "max_price_per_hour 0.45" in warned[0]
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    assert [line["machine_id"] for line in fake.live()] == [501]
    fake.control("offers", [{} for _ in range(6)])


def test_where_nothing_fits_the_condition_that_excluded_most_is_named(fake: Fake, monkeypatch: Any) -> None:
    content = config()
    content["provider"]["offers"]["min_inet_down"] = 9000
    assert "none of 6 offers of 1x RTX 4090 fits; excluded most by min_inet_down 9000 Mb/s: 6" in refused(
        monkeypatch, content
    )


@pytest.mark.parametrize("wrong", [{"image_versions": {"python": "3.9"}}, {"max_price_per_hour": 0.1}])
def test_a_program_that_rents_by_rays_functions_gets_the_same_checks(fake: Fake, wrong: dict[str, Any]) -> None:
    with pytest.raises(click.ClickException, match=r"VersionError|CapError"):
        on_laptop(config(**wrong)).create_node(node_config(), HEAD_TAGS, 1)
    assert fake.live() == []
    assert fake.control("keys") == [], "not even a key was made"


@pytest.mark.parametrize("command", ["exec", "submit", "attach"])
def test_start_rents_no_head_and_says_what_to_type(fake: Fake, monkeypatch: Any, command: str) -> None:
    monkeypatch.setattr(before_up, "ray_command", lambda: command)
    with pytest.raises(click.ClickException, match=rf"`ray {command} --start` would rent one without asking.*`ray up "):
        on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    assert fake.live() == []


@pytest.mark.parametrize("command", ["exec", "submit", "attach"])
def test_start_replaces_no_running_head(running: str, fake: Fake, monkeypatch: Any, command: str) -> None:
    monkeypatch.setattr(before_up, "ray_command", lambda: command)
    with pytest.raises(click.ClickException, match=rf"`ray {command}` would destroy the running head"):
        on_laptop_knowing(running).terminate_node(running)
    assert [str(line["id"]) for line in fake.live()] == [running]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("available_node_types", "rtx4090", "node_config", "min_gpu_gb"), 23, "rtx4090: min_gpu_gb was 24, is 23"),
        (("provider", "offers", "disk_gb"), 400, "rtx4090: disk_gb was 200, is 400"),
        (("provider", "offers", "image"), "other", "rtx4090: image was vastai/pytorch"),
        (("max_workers",), 5, "max_workers was 3, is 5"),
        (("head_node_type",), "a100-40", "head_node_type was rtx4090, is a100-40"),
    ],
)
def test_a_running_head_that_would_be_made_otherwise_is_left_alone(
    running: str, monkeypatch: Any, path: tuple[str, ...], value: Any, said: str
) -> None:
    content = place = config()
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    text = refused(monkeypatch, content)
    assert said in text
    assert "ray down" in text


@pytest.mark.parametrize(
    "change", [{"max_hours": 20}, {"max_total_dollars": 60}, {"boot_minutes": 20}, {"head_silence_minutes": 5}]
)
def test_limits_may_be_changed_while_it_runs(running: str, monkeypatch: Any, change: dict[str, Any]) -> None:
    laptop, shown = ray_up(monkeypatch, config(**change))
    assert laptop.non_terminated_nodes({}) == [running]
    assert shown == [], "nothing is to be rented, so no price is shown"


def test_other_limits_move_the_heads_own_deadline(running: str, monkeypatch: Any) -> None:
    def deadline(**limits: Any) -> int:
        laptop, _ = ray_up(monkeypatch, config(**limits))
        return int(laptop._files(running)["~/.pairscope/deadline"])

    first = deadline()
    assert deadline(max_hours=14) - first == pytest.approx(2 * 3600, abs=5)
    assert first - deadline(max_hours=10) == pytest.approx(2 * 3600, abs=5)


@pytest.mark.parametrize(("limits", "when"), [({"max_hours": 0.1}, "in 6 minutes"), ({"max_hours": 1e-3}, "at once")])
def test_a_running_head_is_not_told_a_deadline_that_would_end_it(
    running: str, monkeypatch: Any, limits: dict[str, float], when: str
) -> None:
    said = refused(monkeypatch, config(**limits))
    assert said.startswith("CapError: cluster 'pairscope' is running, and would end itself " + when)
    assert "of max_hours 0." in said


def test_a_running_head_is_not_told_a_deadline_by_a_wrong_clock(running: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("cluster.vast.api.Vast.clock_ahead", lambda _: 3600.0)
    assert "clock is 60 minutes ahead of Vast's" in refused(monkeypatch)


def test_ray_up_never_replaces_a_running_head(running: str, fake: Fake, monkeypatch: Any, tmp_path: Path) -> None:
    laptop, _ = ray_up(monkeypatch)
    with pytest.raises(click.ClickException, match=r"would destroy the running head.*ray down"):
        laptop.terminate_node(running)
    assert [str(line["id"]) for line in fake.live()] == [running]


def test_a_head_that_was_outbid_is_named_with_what_to_do(running: str, fake: Fake, monkeypatch: Any) -> None:
    fake.control(f"outbid/{running}")
    said = refused(monkeypatch)
    assert f"instance {running}, is stopped" in said
    assert "ray down" in said


def test_two_heads_are_told_and_not_chosen_from(running: str, fake: Fake, monkeypatch: Any) -> None:
    monkeypatch.setattr(before_up, "ray_command", lambda: None)
    vast = on_laptop().fleet.vast  # as another machine, with a state of its own, would
    offer = vast.search({}, bid=False, disk_gb=20)[0]["id"]
    vast.create(offer, image="x", disk=20, label="ps/pairscope/h/1/rtx4090/0badcafe")
    assert "has 2 heads" in refused(monkeypatch)


def test_other_versions_than_the_running_cluster_has_are_refused(running: str, monkeypatch: Any) -> None:
    here = versions()
    monkeypatch.setattr(before_up, "versions", lambda: here | {"ray": "2.50.0"})
    monkeypatch.setattr(before_up, "locked_versions", lambda _: {})
    said = refused(monkeypatch)
    assert said.startswith("VersionError")
    assert f"ray was {here['ray']}, is 2.50.0" in said


def test_versions_that_nodes_could_not_be_given_are_refused_before_renting(fake: Fake, monkeypatch: Any) -> None:
    here = versions()
    monkeypatch.setattr(before_up, "versions", lambda: here | {"ray": "2.50.0"})
    said = refused(monkeypatch)
    assert f"ray: {here['ray']} wanted, 2.50.0 here" in said
    assert "make install" in said


def test_an_image_with_another_python_or_ray_is_refused_before_renting(fake: Fake, monkeypatch: Any) -> None:
    content = config(image_versions={"python": "3.9", "ray": "2.1.0"})
    said = refused(monkeypatch, content)
    assert "python: 3.9 wanted" in said
    assert "ray: 2.1.0 wanted" in said
    have = versions()
    ray_up(monkeypatch, config(image_versions={"python": have["python"], "ray": have["ray"]}))


@pytest.mark.parametrize("wrong", [{"python": 3.11}, {"rey": "2.60.0"}])
def test_image_versions_that_make_no_sense_are_named(fake: Fake, monkeypatch: Any, wrong: dict[str, Any]) -> None:
    assert f"'{next(iter(wrong))}: {next(iter(wrong.values()))}'" in refused(monkeypatch, config(image_versions=wrong))


def test_a_constraints_file_that_agrees_is_no_obstacle(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(
        "# a comment\n" + "".join(f"{k.replace('_', '-')}=={v}+cu130\n" for k, v in versions().items() if k != "python")
    )
    before_up.check_versions({}, file)
    file.write_text("torch==1.0  # old\n")
    with pytest.raises(VersionError, match=r"torch: 1.0 wanted"):
        before_up.check_versions({}, file)


def test_a_name_in_use_by_someone_else_is_refused_also_where_keys_of_that_name_exist(
    running: str, fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(before_up, "ray_command", lambda: None)
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)  # what went was there for long
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "another laptop"))
    with pytest.raises(click.ClickException, match="in use by a cluster that was not made from this machine"):
        on_laptop()
    fake.control(f"vanish/{running}")
    on_laptop()  # makes keys of its own for that name
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "laptop"))
    on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "another laptop"))
    with pytest.raises(click.ClickException, match="not with the keys in"):
        on_laptop()
    assert len(fake.live()) == 1


def test_a_config_that_ray_cached_before_the_keys_were_made_anew_is_still_ours(fake: Fake, monkeypatch: Any) -> None:
    from cluster.vast.provider import VastNodeProvider

    cached = VastNodeProvider.bootstrap_config(config())
    for turn in range(2):  # `ray up`, `ray down`, and the same again with what Ray kept in its cache
        laptop = VastNodeProvider(cached["provider"], cached["cluster_name"])
        laptop.create_node(node_config(), HEAD_TAGS, 1)
        on_laptop()
        if turn == 0:
            laptop.terminate_nodes(laptop.non_terminated_nodes({}))
            laptop.cleanup_cluster_resources()
    assert len(fake.live()) == 1


@pytest.mark.parametrize("command", ["down", "exec"])
def test_a_config_that_ray_cached_before_the_name_was_somebody_elses_reaches_no_machine_of_theirs(
    fake: Fake, tmp_path: Path, monkeypatch: Any, command: str
) -> None:
    from cluster.vast.provider import VastNodeProvider

    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "another laptop"))
    cached = VastNodeProvider.bootstrap_config(config())
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "laptop"))
    on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "another laptop"))
    monkeypatch.setattr(before_up, "ray_command", lambda: command)
    theirs = VastNodeProvider(cached["provider"], cached["cluster_name"])
    ask = theirs.nodes_for_teardown if command == "down" else theirs.non_terminated_nodes
    with pytest.raises(click.ClickException, match="in use by a cluster that was not made from this machine"):
        ask({"ray-node-type": "head"})
    assert len(fake.live()) == 1


def test_a_head_is_not_rented_for_more_than_the_price_that_was_shown(fake: Fake, monkeypatch: Any) -> None:
    laptop, shown = ray_up(monkeypatch)
    assert "$0.441/h" in shown[0]
    fake.control("offers", [{"dph_base": 5.0}])
    with pytest.raises(click.ClickException, match=r"\$0\.441/h was shown, and the cheapest machine costs \$5\."):
        laptop.create_node(node_config(), HEAD_TAGS, 1)
    assert fake.live() == []
    fake.control("offers", [{} for _ in range(6)])
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    assert len(fake.live()) == 1
    assert shown[-1].startswith("Rented instance ")


def test_two_that_were_asked_at_once_rent_one_head(fake: Fake, monkeypatch: Any) -> None:
    one, _ = ray_up(monkeypatch)
    other, _ = ray_up(monkeypatch)  # both saw no head, both ask
    one.create_node(node_config(), HEAD_TAGS, 1)
    with pytest.raises(click.ClickException, match=r"has a head already, or one is being rented.*`ray down` clears"):
        other.create_node(node_config(), HEAD_TAGS, 1)
    assert len(fake.live()) == 1


def test_a_head_whose_request_is_not_answered_yet_is_not_rented_twice(fake: Fake, monkeypatch: Any) -> None:
    one, _ = ray_up(monkeypatch)
    with one.state.edit() as content:
        content["intents"]["0badcafe"] = {"k": 1, "kind": "head", "since": time.time(), "dph": 0.4}
    with pytest.raises(click.ClickException, match="request 0badcafe, not answered yet"):
        one.create_node(node_config(), HEAD_TAGS, 1)
    assert fake.live() == []


def test_a_head_whose_limits_were_raised_is_no_orphan(fake: Fake, monkeypatch: Any) -> None:
    laptop, _ = ray_up(monkeypatch, config(max_hours=1e-4))
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    time.sleep(1.5)
    told = CliRunner().invoke(command, ["orphans"], catch_exceptions=False)
    assert (told.exit_code, "past its deadline" in told.output) == (1, True)
    on_laptop(config(max_hours=12)).fleet.refresh()
    raised, _ = ray_up(monkeypatch, config(max_hours=12))
    raised._files(head)  # what `ray up` writes to the head
    told = CliRunner().invoke(command, ["orphans"], catch_exceptions=False)
    assert (told.exit_code, told.output) == (0, "no orphans\n")
    assert "past its deadline" not in CliRunner().invoke(command, ["nodes"], catch_exceptions=False).output


def test_a_cluster_that_was_destroyed_by_hand_leaves_no_spending_to_the_next_of_its_name(
    running: str, fake: Fake, monkeypatch: Any
) -> None:
    laptop = on_laptop_knowing(running)
    with laptop.state.edit() as content:
        content["gone"].append({"id": "1", "kind": "head", "dph": 1.0, "since": 0.0, "until": 39 * 3600.0})
        content["seen"][running]["since"] -= 3 * 3600
    done = CliRunner().invoke(command, ["destroy", "--cluster", "pairscope", "--yes"], catch_exceptions=False)
    assert f"{running} is gone" in done.output
    after = on_laptop()
    assert after.fleet.bill().dollars == 0
    assert after.state.read()["made"] == {}
    assert fake.control("keys") == []
    with after.state.edit() as content:  # one that ended itself
        content["gone"].append({"id": "1", "kind": "head", "dph": 1.0, "since": 0.0, "until": 39 * 3600.0})
    done = CliRunner().invoke(command, ["destroy", "--cluster", "pairscope", "--yes"], catch_exceptions=False)
    assert "nothing to destroy" in done.output
    assert on_laptop().fleet.bill().dollars == 0


def test_workers_that_come_at_once_are_told_of_and_counted(fake: Fake, monkeypatch: Any) -> None:
    content = config()
    content["available_node_types"]["rtx4090"]["min_workers"] = 2  # the head is one of them
    content["available_node_types"]["rtx4090-spot"] |= {"min_workers": 2, "max_workers": 2}
    _, shown = ray_up(monkeypatch, content)
    assert shown[1] == "At once, and as long as the cluster is up: 1 more of type rtx4090, now $0.441/h each."
    assert shown[2] == "While entries wait: up to 2 more of type rtx4090, now $0.441/h each."
    assert shown[3] == "At once, and as long as the cluster is up: 2 more of type rtx4090-spot, now $0.291/h each."
    assert "rtx4090-spot" not in shown[4]


def test_workers_that_would_come_at_once_and_cross_the_limit_are_refused(fake: Fake, monkeypatch: Any) -> None:
    content = config(max_price_per_hour=1.4)
    content["available_node_types"]["rtx4090-spot"] |= {"min_workers": 4, "max_workers": 4}
    content["max_workers"] = 8
    assert "min_workers 4 of node type 'rtx4090-spot' costs $1.164/h; with $0.441/h rented" in refused(
        monkeypatch, content
    )


def test_more_workers_at_once_than_there_may_be_are_refused(fake: Fake, monkeypatch: Any) -> None:
    content = config()
    content["available_node_types"]["rtx4090-spot"] |= {"min_workers": 2, "max_workers": 1}
    assert "node type 'rtx4090-spot': min_workers 2 is more than there may be, 1" in refused(monkeypatch, content)


@pytest.mark.parametrize(("off_h", "word"), [(13.0, "780 minutes ahead of"), (-13.0, "780 minutes behind")])
def test_a_clock_that_is_wrong_is_refused_before_it_sets_a_deadline(
    fake: Fake, monkeypatch: Any, off_h: float, word: str
) -> None:
    monkeypatch.setattr("cluster.vast.api.time", types.SimpleNamespace(time=lambda: time.time() + off_h * 3600))
    assert f"this machine's clock is {word} Vast's" in refused(monkeypatch)
