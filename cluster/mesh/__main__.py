"""`python -m cluster.mesh up|status|flags|down|daemon`: this node's part of the mesh.

up      start the daemon if it is not running, and wait until Ray's way to the head and back is open
status  this node's tunnels, one a line
flags   what `ray start` needs on this node
down    end the daemon and its tunnels
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from capture.errors import PairscopeError
from cluster.mesh import daemon as mesh_daemon
from cluster.mesh.daemon import ask
from cluster.mesh.peers import mesh_folder, read_mesh
from cluster.mesh.ports import HEAD, ray_flags


class MeshError(PairscopeError):
    """The tunnels did not come up."""


@click.group()
def mesh() -> None:
    """This node's part of the ssh mesh."""


@mesh.command()
def daemon() -> None:
    """Keep the tunnels; what `up` starts."""
    mesh_daemon.run(mesh_folder())


@mesh.command()
def keep() -> None:
    """Run the daemon, and run it again if it dies; ends when `down` ends it."""
    mesh_daemon.keep(lambda: subprocess.Popen([sys.executable, "-m", "cluster.mesh", "daemon"]))


@mesh.command()
@click.option("--wait", default=120.0, show_default=True, help="Seconds to wait for the tunnels.")
def up(wait: float) -> None:
    """Start the daemon and wait until the tunnels carry."""
    folder = mesh_folder()
    k = read_mesh(folder).k
    if ask(k, "status", timeout=2) is None:
        with open(folder / "daemon.log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "cluster.mesh", "keep"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
    until = time.monotonic() + wait
    while True:
        missing = _missing(k, folder)
        if missing is None:
            click.echo(f"mesh: node {k} is in")
            return
        if time.monotonic() > until:
            raise MeshError(f"the mesh of node {k} is not up after {wait:.0f} s: {missing}")
        time.sleep(0.3)


def _missing(k: int, folder: Path) -> str | None:
    """What is not there yet, in words; None when all is."""
    own = ask(k, "status", timeout=2)
    if own is None:
        log = folder / "daemon.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f"its daemon does not answer ({lines[-1] if lines else 'no log'})"
    if k == HEAD:
        return None
    reply = ask(HEAD, f"probe {k}")
    if reply is None:
        state = own["tunnels"][0] if own["tunnels"] else {}
        return f"no way to the head at {state.get('to')} ({state.get('last_error') or 'ssh is trying'})"
    return None if reply.get("ok") else "the head has no way back to this node yet"


@mesh.command()
def status() -> None:
    """Show this node's tunnels."""
    k = read_mesh(mesh_folder()).k
    found = ask(k, "status", timeout=3)
    if found is None:
        raise MeshError(f"the daemon of node {k} is not running; start it with python -m cluster.mesh up")
    click.echo(f"node {k} of a mesh with places for {found['slots']}")
    for t in found["tunnels"]:
        state = f"up {t['seconds']:.0f} s" if t["alive"] else f"down: {t['last_error']}"
        click.echo(f"to node {t['k']} at {t['to']}: {state}, started {t['starts']}x")


@mesh.command()
def flags() -> None:
    """Print the flags of `ray start` for this node."""
    click.echo(" ".join(ray_flags(read_mesh(mesh_folder()).k)))


@mesh.command()
def down() -> None:
    """End the daemon and its tunnels."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((mesh_folder() / "daemon.pid").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    try:
        mesh(prog_name="python -m cluster.mesh")
    except PairscopeError as error:
        click.echo(f"pairscope: {type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
