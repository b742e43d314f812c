"""A cluster's own keys: both halves of a pair or none, whatever ends the making."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from capture.errors import ConfigError
from cluster.vast import keys

HOMES = ["home", "a home", "it's 100%d", 'say "home"', "back\\slash"]
SERVERS = "/usr/sbin:/usr/local/sbin:/usr/bin:/sbin"
pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


def test_a_key_that_could_not_be_made_whole_is_made_by_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, programs = tmp_path / "cluster", tmp_path / "bin"
    programs.mkdir()
    broken = programs / "ssh-keygen"  # as on a disk that is full after the private key
    broken.write_text(
        '#!/bin/sh\nfor last; do :; done\necho half > "$last"\necho "Saving key: No space left on device" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    with monkeypatch.context() as full:
        full.setenv("PATH", str(programs), prepend=":")
        with pytest.raises(ConfigError, match=r"could not make the ssh key '.*id_ed25519': .*No space left on device"):
            keys.make_missing(folder)
    keys.make_missing(folder)
    assert len(keys.owner(folder)) == 12
    names = {path.name for path in folder.iterdir()}
    assert names == {"id_ed25519", "id_ed25519.pub", "mesh_ed25519", "mesh_ed25519.pub", "auth_token"}
    assert {oct((folder / name).stat().st_mode & 0o777) for name in ("id_ed25519", "mesh_ed25519")} == {"0o600"}


def test_keys_that_others_can_read_since_they_were_copied_are_closed_again(tmp_path: Path) -> None:
    keys.make_missing(tmp_path)
    for name in ("id_ed25519", "mesh_ed25519", "auth_token"):
        (tmp_path / name).chmod(0o644)  # ssh would pass over such a key, with a machine rented that lets in no other
    keys.make_missing(tmp_path)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("id_ed25519", "mesh_ed25519", "auth_token")} == {
        0o600
    }


def test_a_disk_that_keeps_no_key_to_its_owner_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.make_missing(tmp_path)
    (tmp_path / "id_ed25519").chmod(0o777)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)  # as on a disk of Windows' file systems
    keys.make_missing(tmp_path)  # for `ray down`, which needs no ssh
    with pytest.raises(ConfigError, match=r"id_ed25519' can be read by others, .*ssh does not use it.*PAIRSCOPE_HOME"):
        keys.check_closed(tmp_path)


def test_a_public_key_that_was_not_copied_is_made_from_the_private_one(tmp_path: Path) -> None:
    keys.make_missing(tmp_path)
    owner = keys.owner(tmp_path)
    (tmp_path / "id_ed25519.pub").unlink()
    assert keys.owner(tmp_path) == owner
    keys.make_missing(tmp_path)
    assert keys.owner(tmp_path) == owner


def test_a_private_key_that_is_none_is_said_to_be_so(tmp_path: Path) -> None:
    keys.make_missing(tmp_path)
    (tmp_path / "id_ed25519").write_text("half\n")
    (tmp_path / "id_ed25519.pub").unlink()
    with pytest.raises(ConfigError, match=r"id_ed25519' is no key that ssh-keygen can read"):
        keys.make_missing(tmp_path)


@pytest.mark.parametrize("home", HOMES)
def test_a_path_is_one_word_for_ssh(home: str) -> None:
    assert shlex.split(keys.as_option(Path("/home") / home)) == [f"/home/{home}".replace("%", "%%")]


@pytest.mark.skipif(not shutil.which("sshd", path=SERVERS), reason="sshd is not installed")
@pytest.mark.parametrize("home", HOMES)
def test_host_keys_are_pinned_in_the_clusters_folder_whatever_it_is_called(tmp_path: Path, home: str) -> None:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where root's sshd goes, or it ends at once
    folder = tmp_path / home / "cluster"
    keys.make_missing(folder)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "host")], check=True)
    server = f"{shutil.which('sshd', path=SERVERS)} -i -e -f /dev/null -h {tmp_path / 'host'}"
    subprocess.run(
        ["ssh", "-F", "none", "-o", f"ProxyCommand={server}", "-o", "HostKeyAlias=vast-7", "-o", "BatchMode=yes",
         "-o", "StrictHostKeyChecking=accept-new", "-o", "HashKnownHosts=no",
         "-o", f"UserKnownHostsFile={keys.as_option(folder / keys.KNOWN_HOSTS)}", "nobody@nowhere", "true"],
        capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "host.pub").read_text().split()[1] in keys.pinned(folder / keys.KNOWN_HOSTS, "vast-7")
    assert {path.name for path in tmp_path.iterdir()} == {home, "host", "host.pub"}
