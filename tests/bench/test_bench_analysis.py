"""The benches of the analysis run, on run directories small enough to say nothing about speed."""

from pathlib import Path

import bench_analysis
import bench_import
from measured import Bench, wrong_result


def test_the_bench_asks_the_same_of_a_run_directory_and_of_json(tmp_path: Path) -> None:
    rows = 2 * bench_analysis.ROWS * bench_analysis.N_PAIRS
    found = bench_analysis.measure(tmp_path / "large", tmp_path / "small", rows, rows // 2, repeats=1)
    assert found["rows"] == rows
    assert found["json_cells"] == bench_analysis.ROWS
    assert set(found["seconds"]) == set(bench_analysis.SECONDS)
    assert all(s["median"] > 0 for s in found["seconds"].values())
    assert all(t > 1 for t in bench_analysis.times_faster(found).values())
    assert "times" in bench_analysis.table(found)
    bench = Bench("analysis", "make bench-analysis", threads=2)
    bench_analysis.report(bench, found)
    assert wrong_result(bench.result()) == []


def test_the_memory_of_an_import_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, large = (bench_import.measure(mb, tmp_path) for mb in (1, 12))
    assert large["file_mb"] > 8 * small["file_mb"]
    assert large["cells"] > 8 * small["cells"]
    assert large["peak_mb"] < small["peak_mb"] + 150, "held whole, it would take some hundred MB more"
