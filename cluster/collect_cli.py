"""The `collect` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capture.cli import HELP

if TYPE_CHECKING:
    from capture.layout import RunDir


@click.command(
    context_settings=HELP, epilog="\b\nExample:\n  pairscope collect ray_cluster.yaml --out out/prod --teardown"
)
@click.argument("cluster", default="ray_cluster.yaml")
@click.option("--out", required=True, help="Run directory at home; what is there and verified is not fetched again.")
@click.option(
    "--teardown", is_flag=True, help="`ray down` once the sweep has ended and all of it is at home, verified."
)
@click.option(
    "--every", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Seconds between two looks."
)
@click.option("-n", "--cluster-name", metavar="NAME", help="The cluster's name, where `ray up -n` was given another.")
@click.option("--once", is_flag=True, help="Look once instead of following the sweep to its end.")
@click.option(
    "--remote-out",
    metavar="PATH",
    help="The sweep's --out on the head, or its s3:// or gs:// URI.  [default: the last sweep's]",
)
def collect(
    cluster: str, out: str, teardown: bool, every: float, cluster_name: str | None, once: bool, remote_out: str | None
) -> None:
    """Bring finished captures home from the cluster of CLUSTER (the YAML of `ray up`) while its sweep runs.

    Each capture is fetched as soon as it is complete, checked against its marker (bytes, checksums, rows) and put in place,
    the marker last; manifest and logs follow. A lost connection is tried again, and what was fetched of a file is kept. Run
    it again at any time: it goes on. Exit code: 0 the sweep has ended and all of it is at home (with --once: all that is
    complete so far), 1 something failed or is missing, 2 the call or the config is wrong, 130 after Ctrl-C.
    """
    from capture.attempt import check_output
    from capture.layout import RunDir
    from capture.show import Show
    from capture.stop import Stop
    from cluster.collect import sole_collector
    from cluster.collect_follow import Follow
    from cluster.collect_head import HeadWay
    from cluster.collect_source import HeadSource

    way = HeadWay(cluster, cluster_name)
    if remote_out is not None and "://" not in remote_out:
        remote_out = remote_out.rstrip("/") or "/"
        if not remote_out.startswith("/"):
            raise click.BadParameter(
                "must start with '/': it is a path on the head, or a URI", param_hint="--remote-out"
            )
    home = RunDir(out)
    check_output(home)
    show = Show()
    with (
        sole_collector(home),
        show,
        Stop(lambda line: show.note("stopping; what is at home stays, the rest is gone on with")) as stop,
    ):
        follow = Follow(
            HeadSource(way), remote_out, home, show, stop, every=every, once=once,
            tear_down=(lambda: take_down(cluster, cluster_name)) if teardown else None,
        )  # fmt: skip
        try:
            code = follow.run()
        except KeyboardInterrupt:
            code = stop.exit_code
    _next(home)
    sys.exit(code)


def take_down(cluster: str, name: str | None = None) -> int:
    """`ray down` as a person would; its exit code, 0 or 1."""
    beside = Path(sys.executable).with_name("ray")
    program = [str(beside)] if beside.exists() else [sys.executable, "-m", "ray.scripts.scripts"]
    words = ["down", "-y", cluster, *(["-n", name] if name else [])]
    done = subprocess.run([*program, *words], stdin=subprocess.DEVNULL, stdout=sys.stderr, env=dict(os.environ))
    if done.returncode:
        call = shlex.join(["ray", *words])
        click.echo(
            f"pairscope: `{call}` ended with {done.returncode}: look at `pairscope vast nodes`, it may still cost money",
            err=True,
        )
    return 1 if done.returncode else 0


def _next(home: RunDir) -> None:
    from capture.show import tell

    if any(True for _ in home.captures()):
        tell("\nnext:")
        tell(f"  pairscope status {shlex.quote(home.out)}")
        tell(f"  pairscope report {shlex.quote(home.out)}")
