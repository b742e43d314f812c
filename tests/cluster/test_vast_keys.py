"""A cluster's own keys: both halves of a pair or none, whatever ends the making."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capture.errors import ConfigError
from cluster.vast import keys

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
