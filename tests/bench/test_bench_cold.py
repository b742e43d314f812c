"""The bench of a cold disk can tell what of a file is in memory."""

from pathlib import Path

import pytest
from bench_cold import in_memory


def test_pages_that_were_written_are_in_memory_and_those_of_a_hole_are_not(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("w+b") as stream:
        stream.write(b"x" * (1 << 20))
        stream.truncate(4 << 20)
        stream.flush()
        assert in_memory(stream.fileno(), 4 << 20) == pytest.approx(0.25, abs=0.01)
