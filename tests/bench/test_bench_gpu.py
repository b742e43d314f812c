"""The bench for GPUs, rehearsed on a CPU: that it runs, and that it needs neither Ray nor DuckDB."""

import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
from measured import Bench, wrong_result

_CHILD = """
import sys
for name in ("ray", "duckdb"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import bench_gpu, json
from pathlib import Path
from measured import Bench
bench = Bench("gpu", "make bench-gpu", threads=1)
bench_gpu.CASES["12"] = (6, 2)
bench_gpu.run(bench, ["rehearsal"], ["12"], 1, "cpu", Path(sys.argv[2]))
print(json.dumps(bench.result()))
"""


@pytest.mark.slow  # a minute of a whole core
def test_a_rehearsal_without_ray_and_duckdb_gives_all_figures(tmp_path):
    import json

    here = str(Path(bench_gpu.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, here, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert wrong_result(result) == []
    names = {f["name"] for f in result["figures"]}
    assert {"rehearsal shape 12 eager", "rehearsal shape 12 without the lens", "rehearsal shape streamed"} <= names
    assert {"rehearsal shape 12 eager, memory", "rehearsal shape streamed, memory"} <= names


def test_a_pair_that_the_disk_does_not_hold_gets_fewer_layers(tmp_path, monkeypatch):
    shape = bench_gpu.SHAPES["rehearsal"]
    assert bench_gpu.fitting(shape, tmp_path) == shape
    model = bench_gpu.on_meta(shape)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    whole = sum(p.nbytes for p in model.parameters())

    def free(nbytes):
        usage = type("Usage", (), {"free": nbytes})
        monkeypatch.setattr(bench_gpu.shutil, "disk_usage", lambda _: usage)

    free(2 * bench_gpu.ROOM * (whole - 1.5 * layer))
    assert bench_gpu.fitting(shape, tmp_path)["num_hidden_layers"] == shape["num_hidden_layers"] - 2
    free(layer)
    with pytest.raises(SystemExit, match="two layers of both models need"):
        bench_gpu.fitting(shape, tmp_path)


def test_busy_time_is_counted_once_where_kernels_overlap():
    assert bench_gpu.covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert bench_gpu.covered([]) == 0
    assert Bench("gpu", "make bench-gpu").figures == []
