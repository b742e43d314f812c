"""The switch that ends a node by itself: at its deadline, or when its head has been silent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from fake_server import Fake, hasty, running_fake, wait_for

import cluster.mesh.daemon as daemon_module
from cluster.mesh.daemon import UNWATCHED_S, Daemon, _Server
from cluster.mesh.peers import POLLED, Mesh, note_poll, write_deadline
from cluster.vast import deadman
from cluster.vast.api import Vast
from cluster.vast.container import LONGEST_SCRIPT, environment, start_script

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running_fake("--boot", "0,0") as server:
        yield server


@contextmanager
def node(
    fake: Fake,
    tmp_path: Path,
    *,
    deadline: float,
    silence_s: float = 0,
    head: str = "",
    more: dict[str, str] | None = None,
) -> Iterator[int]:
    """A rented instance whose start script runs here, as it would in the container."""
    vast = Vast("full-rights", fake.url, sleep=hasty)
    taken = {line["ask"] for line in fake.live()}
    offer = next(o["id"] for o in vast.search({}, bid=False, disk_gb=1) if o["id"] not in taken)
    id_ = vast.create(offer, image="x", disk=1)
    key = next(line["key"] for line in fake.live() if line["id"] == id_)
    env = environment(2, api=fake.url, deadline=int(deadline), silence_s=silence_s, owner="", launch="", request="")
    env |= {"PAIRSCOPE_HEAD": head, "CONTAINER_ID": str(id_), "CONTAINER_API_KEY": key, "PAIRSCOPE_CHECK_S": "0.1"} | (
        more or {}
    )
    text = start_script()
    assert "python3 " in text
    assert "sleep 5" in text
    (tmp_path / "script").write_text(text.replace("python3 ", f"{sys.executable} ").replace("sleep 5", "sleep 0.1"))
    process = subprocess.Popen(
        ["bash", str(tmp_path / "script")],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | env,
        start_new_session=True,
    )
    (tmp_path / "session").write_text(str(process.pid))
    try:
        yield id_
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def switches(tmp_path: Path) -> list[int]:
    """The switches of a node that run now."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            ours = os.getpgid(int(path.name)) == int((tmp_path / "session").read_text())
            if ours and words[0] == sys.executable.encode() and words[1].endswith(b"deadman.py"):
                found.append(int(path.name))
    return found


def ended_by(fake: Fake, id_: int) -> str | None:
    return str(next(line["ended_by"] for line in fake.bill() if line["id"] == id_) or "")


def test_a_node_destroys_itself_when_its_deadline_has_passed(fake: Fake, tmp_path: Path) -> None:
    with node(fake, tmp_path, deadline=time.time() + 2) as id_:
        time.sleep(0.5)
        assert ended_by(fake, id_) == ""
        assert wait_for(lambda: ended_by(fake, id_)) == "itself"


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_a_switch_that_is_killed_is_there_again_and_does_its_work(fake: Fake, tmp_path: Path) -> None:
    with node(fake, tmp_path, deadline=time.time() + 3600) as id_:
        before: set[int] = set()
        for _ in range(3):
            (pid,) = wait_for(lambda: [p for p in switches(tmp_path) if p not in before], 60)
            before.add(pid)
            os.kill(pid, signal.SIGKILL)
        assert ended_by(fake, id_) == ""
        (tmp_path / ".pairscope" / "deadline").write_text(f"{time.time() - 1}\n")
        assert wait_for(lambda: ended_by(fake, id_), 60) == "itself"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="it is kept in /dev/shm")
@pytest.mark.parametrize("home", ["full", "not to be written to"])
def test_a_machine_whose_disk_takes_no_file_has_its_switch_all_the_same(fake: Fake, tmp_path: Path, home: str) -> None:
    if home == "full":
        (tmp_path / ".pairscope").mkdir()
        (tmp_path / ".pairscope" / "deadman.py").symlink_to("/dev/full")
    else:
        (tmp_path / ".pairscope").write_text("no folder")
    with node(fake, tmp_path, deadline=time.time() + 3) as id_:
        (pid,) = wait_for(lambda: switches(tmp_path))
        place = Path(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1].decode()).parent
        try:
            assert wait_for(lambda: ended_by(fake, id_)) == "itself"
        finally:
            if place.parent == Path("/dev/shm"):
                shutil.rmtree(place)


def test_a_switch_that_comes_after_another_counts_the_heads_silence_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PAIRSCOPE_DEADLINE", str(time.time() + 3600))
    monkeypatch.setenv("PAIRSCOPE_SILENCE_S", "60")
    monkeypatch.setenv("PAIRSCOPE_HEAD", "nowhere")
    monkeypatch.setattr(deadman.time, "sleep", _slept)
    monkeypatch.setattr(deadman, "end", _ended)
    (tmp_path / ".pairscope").mkdir()
    for said in (None, "", "soon", str(time.monotonic() - 50), str(time.monotonic() + 50)):
        if said is not None:
            (tmp_path / ".pairscope" / "deadman.beat").write_text(said)
        with pytest.raises(_Slept):
            deadman.watch()
    (tmp_path / ".pairscope" / "deadman.beat").write_text(str(time.monotonic() - 61))
    with pytest.raises(_Ended):
        deadman.watch()


class _Slept(BaseException): ...


class _Ended(BaseException): ...


def _slept(seconds: float) -> None:
    raise _Slept


def _ended() -> None:
    raise _Ended


def test_it_asks_again_where_the_first_destroy_was_ignored_or_failed(fake: Fake, tmp_path: Path) -> None:
    fake.control("faults", [])
    fake.fault("destroy", "garbage", times=2)
    fake.fault("destroy", "drop", times=2)
    fake.fault("destroy", "503", times=2)
    fake.fault("destroy", "ignored", times=2)
    with node(fake, tmp_path, deadline=time.time() - 1) as id_:
        assert wait_for(lambda: ended_by(fake, id_)) == "itself"


def test_a_worker_whose_head_is_silent_destroys_itself_and_one_whose_head_speaks_does_not(
    fake: Fake, tmp_path: Path
) -> None:
    head = socket.create_server(("127.0.0.1", 0))

    def speak() -> None:
        try:
            while True:
                peer, _ = head.accept()
                with peer:
                    peer.recv(10)
                    peer.sendall(b"{}\n")
        except OSError:
            return

    threading.Thread(target=speak, daemon=True).start()
    address = f"127.0.0.1:{head.getsockname()[1]}"
    with node(fake, tmp_path, deadline=time.time() + 600, silence_s=1, head=address) as id_:
        time.sleep(2)
        assert ended_by(fake, id_) == ""
        head.shutdown(socket.SHUT_RDWR)
        head.close()
        assert wait_for(lambda: ended_by(fake, id_)) == "itself"


def test_a_head_whose_autoscaler_no_longer_polls_is_silent_for_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node.json").write_text(Mesh(1, 4).node_text)
    head = Daemon(tmp_path)
    server = _Server(("127.0.0.1", 0), head)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("PAIRSCOPE_HEAD", f"127.0.0.1:{server.server_address[1]}")
    try:
        assert deadman.head_speaks(), "no poll yet, but the head has just begun"
        head.began -= UNWATCHED_S
        assert not deadman.head_speaks(), "it began long ago, and there never was a poll"
        note_poll(tmp_path)
        assert deadman.head_speaks()
        late = time.time() - UNWATCHED_S
        os.utime(tmp_path / POLLED, (late + 60, late + 60))
        assert deadman.head_speaks()
        os.utime(tmp_path / POLLED, (late, late))
        assert not deadman.head_speaks(), "the last poll is too old"
        assert head.answer("status"), "its tunnels are told all the same"
    finally:
        server.shutdown()
        server.server_close()


def test_a_worker_is_gone_when_its_head_has_to_be_and_hears_of_raised_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemons = {}
    for k in (1, 2):
        folder = tmp_path / str(k) / ".pairscope" / "mesh"
        folder.mkdir(parents=True)
        (folder / "node.json").write_text(Mesh(k, 4).node_text)
        daemons[k] = Daemon(folder)
    head, worker = daemons[1], daemons[2]
    monkeypatch.setenv("HOME", str(tmp_path / "2"))
    monkeypatch.setenv("PAIRSCOPE_DEADLINE", "1000")
    worker.take_limit(head.answer("watched"))
    assert deadman.deadline() == 1000, "the head was told nothing yet"
    write_deadline(head.folder, 5000)
    worker.take_limit(head.answer("watched"))
    assert deadman.deadline() == 5000
    for word in (
        None,
        {},
        {"deadline": None},
        {"deadline": "9000"},
        {"deadline": True},
        {"deadline": float("nan")},
        {"deadline": -1},
    ):
        worker.take_limit(word)
    assert deadman.deadline() == 5000
    write_deadline(head.folder, 9000)
    head.began -= UNWATCHED_S
    worker.take_limit(head.answer("watched"))
    assert deadman.deadline() == 5000, "a head that nobody keeps to the limits says nothing of them"


def test_a_workers_daemon_asks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def ask(k: int, line: str) -> dict[str, float]:
        asked.append((k, line))
        return {"deadline": 5000.0}

    monkeypatch.setattr(daemon_module, "ask", ask)
    monkeypatch.setattr(daemon_module, "LIMITS_EVERY_S", 0.01)
    monkeypatch.setattr(daemon_module, "address", lambda _: "127.0.0.1")
    monkeypatch.setattr(daemon_module, "block", lambda _: -daemon_module.STATUS)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".pairscope" / "mesh"
    folder.mkdir(parents=True)
    (folder / "node.json").write_text(Mesh(2, 4).node_text)
    made = Daemon(folder)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        wait_for(lambda: asked and deadman.deadline() == 5000.0)
    finally:
        made.ending.set()
        thread.join(timeout=10)
    assert set(asked) == {(1, "watched")}


def test_a_deadline_is_replaced_whole_and_a_full_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    when = 4102444800.0
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".pairscope" / "mesh"
    folder.mkdir(parents=True)
    write_deadline(folder, when)

    def half(path: Path, text: str) -> None:
        with open(path, "w") as stream:
            stream.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    write_deadline(folder, when + 1)
    assert deadman.deadline() == when


def test_a_later_deadline_may_be_written_to_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PAIRSCOPE_DEADLINE", "100")
    assert deadman.deadline() == 100
    (tmp_path / ".pairscope").mkdir()
    (tmp_path / ".pairscope" / "deadline").write_text("200\n")
    assert deadman.deadline() == 200


def test_a_clock_that_is_set_back_gives_a_node_no_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PAIRSCOPE_DEADLINE", "1060")
    passed, back = 0.0, 0.0

    def sleep(_: float) -> None:
        nonlocal passed, back
        passed, back = passed + 20, 7200.0

    class Ended(BaseException):
        pass

    def end() -> None:
        raise Ended

    monkeypatch.setattr(deadman, "end", end)
    monkeypatch.setattr(deadman.time, "time", lambda: 1000 + passed - back)
    monkeypatch.setattr(deadman.time, "monotonic", lambda: 5 + passed)
    monkeypatch.setattr(deadman.time, "sleep", sleep)
    with pytest.raises(Ended):
        deadman.watch()
    assert passed == 60


@pytest.mark.parametrize("head", ["", "nowhere", "127.0.0.1:port", "127.0.0.1:99999"])
def test_an_address_of_the_head_that_makes_no_sense_is_a_silent_head_and_ends_no_switch(
    monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.setenv("PAIRSCOPE_HEAD", head)
    assert deadman.head_speaks() is (head == "")


@pytest.mark.parametrize("said", [None, "", "soon"])
def test_a_node_that_was_told_no_deadline_has_passed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PAIRSCOPE_DEADLINE", raising=False)
    if said is not None:
        monkeypatch.setenv("PAIRSCOPE_DEADLINE", said)
    assert deadman.deadline() == 0


@pytest.mark.parametrize("said", ["soon", "", "nan", "-1", "inf"])
def test_numbers_of_the_environment_that_make_no_sense_end_no_switch(fake: Fake, tmp_path: Path, said: str) -> None:
    more = dict.fromkeys(("PAIRSCOPE_SILENCE_S", "PAIRSCOPE_CHECK_S"), said)
    with node(fake, tmp_path, deadline=time.time() + 1, more=more):
        wait_for(lambda: (tmp_path / ".pairscope" / "deadman.beat").exists())
        assert "Error" not in (tmp_path / ".pairscope" / "deadman.log").read_text()
    odd = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PAIRSCOPE_DEADLINE": said}
    code = "from cluster.vast import deadman; print(deadman.deadline(), deadman.EVERY_S)"
    found = subprocess.run([sys.executable, "-c", code], env=odd, capture_output=True, text=True, check=True).stdout
    assert found == "0.0 20.0\n"


def test_the_start_script_fits_and_a_longer_one_is_refused() -> None:
    assert len(start_script("echo more")) < LONGEST_SCRIPT
    with pytest.raises(Exception, match="Vast takes 4000"):
        start_script("x" * 4000)
