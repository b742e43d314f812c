"""What a worker holds for others while it is asked, without Ray around it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cluster.actor import CaptureActor

MEETS = """
import sys, torch, torch.distributed as dist
from capture.group import join_group, leave_group
from capture.ranks import Ranks
group = join_group(Ranks(1, 2, sys.argv[1], int(sys.argv[2])), torch.device("cpu"), minutes=1)
assert group.sum(torch.tensor(1.0)).item() == 2
leave_group(group)
"""
LEADS = """
import subprocess, sys, torch
from capture.group import join_group, leave_group
from capture.ranks import Ranks
from cluster.actor import CaptureActor
actor = CaptureActor({})
address, port = actor.meeting_place()
other = subprocess.Popen([sys.executable, "-c", sys.argv[1], address, str(port)])
group = join_group(Ranks(0, 2, address, port, actor._meeting.fileno()), torch.device("cpu"), minutes=1)
assert group.sum(torch.tensor(1.0)).item() == 2
leave_group(group)
assert actor._meeting.fileno() >= 0, "it stays the actor's"
sys.exit(other.wait())
"""


def test_the_port_where_ranks_meet_is_held_for_them() -> None:
    actor = CaptureActor({})
    place = actor.meeting_place()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(place)
    again = actor.meeting_place()
    assert again != place
    with socket.socket() as other:
        other.bind(place)  # one at a time


def test_ranks_meet_at_a_port_that_is_held() -> None:
    subprocess.run([sys.executable, "-c", LEADS, MEETS], check=True, timeout=300)
