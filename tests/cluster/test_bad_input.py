"""What cannot run is told with the entry's name and a remedy, as early as it can be known, and the sweep goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_work import make_entry, quiet
from test_rank_groups import entry as pydoc
from test_rank_groups import placement_groups

from capture.layout import RunDir
from capture.settings import Spans
from cluster.sweep import Summary, plan, run_sweep


def errors_of(summary: Summary) -> dict[str, str]:
    return {i.name: f"{i.row['error_class']}: {i.row['error']}" for i in summary.items if i.state == "failed"}


def named(name: str, **changes: Any) -> Any:
    return name, pydoc(**({"name": name, "tensor_parallel": 1, "spans": Spans()} | changes))


def test_what_the_driver_can_know_is_told_before_any_place_is_asked_for(tmp_path: Path) -> None:
    nemo, zarr = tmp_path / "nemo", tmp_path / "zarr"
    for directory, file in ((nemo, "big.nemo"), (zarr, "model_weights/layer.zarr/0.0")):
        (directory / file).parent.mkdir(parents=True)
        (directory / file).write_text("")
    summary = run_sweep(
        [
            named("degree", tensor_parallel=3),
            named("nemo", base_model=str(nemo)),
            named("zarr", base_model=str(zarr)),
            named("spans", spans=Spans(workers=99)),
        ],
        str(tmp_path / "out"),
        show=quiet()[0],
    )
    errors = errors_of(summary)
    assert "do not divide by 3; tensor_parallel may be 1, 2" in errors["degree"]
    assert "CheckpointError" in errors["nemo"]
    assert "only a NeMo archive ('big.nemo')" in errors["nemo"]
    assert "zarr" in errors["zarr"]
    assert "spans.workers is 99 and the models have" in errors["spans"]
    assert summary.ray_used is False
    rows = {r["entry"]: r["error_class"] for r in RunDir(str(tmp_path / "out")).manifest_rows()}
    assert set(rows) == {"degree", "nemo", "zarr", "spans"}


@pytest.mark.usefixtures("local_ray")
class TestThroughRay:
    def test_what_the_hub_says_is_each_entrys_own_error(self, tmp_path: Path) -> None:
        on_hub = [
            (n, make_entry(n, base_model=f"owner/{n}", weights="download")) for n in ("gated", "large", "nemo", "zarr")
        ]
        show, said = quiet()
        summary = run_sweep([*on_hub, named("good")], str(tmp_path), show=show, work="bad_hub:capture")
        errors = errors_of(summary)
        assert {i.name: i.state for i in summary.items if i.state != "failed"} == {"good": "complete"}
        assert errors["gated"].startswith("CheckpointError: 'owner/gated' is gated: accept its terms")
        assert "hf auth login" in errors["gated"]
        assert "'owner/large' needs 9313225.7 GiB more on disk" in errors["large"]
        assert "only a NeMo archive ('nemotron.nemo')" in errors["nemo"]
        assert "zarr" in errors["zarr"]
        for name in errors:
            assert f"{name}: failed: {errors[name][:60]}" in said.getvalue()

    def test_a_place_that_never_comes_is_given_up_and_the_others_go_on(self, tmp_path: Path) -> None:
        import ray

        holder = ray.remote(num_gpus=2, num_cpus=0)(_Holder).remote()
        ray.get(holder.here.remote())
        try:
            summary = run_sweep(
                [
                    named("complete-alone", device="cuda"),
                    named("complete-group", device="cuda", tensor_parallel=2),
                    named("complete"),
                ],
                str(tmp_path),
                show=quiet()[0],
                work="fake_work:by_name",
                place_within=12.0,  # time for the worker of the third one to start
            )
        finally:
            ray.kill(holder)
        errors = errors_of(summary)
        assert set(errors) == {"complete-alone", "complete-group"}
        alone, group = errors["complete-alone"], errors["complete-group"]
        expected = "DeviceError: entry 'complete-alone' asks for 1 GPU, 1 CPU on one node, and got no place within 12 s; there is "
        assert alone.startswith(expected)
        assert "asks for 2 GPUs, 2 CPUs for 2 ranks on one node" in group
        assert "0 of 2 GPUs free" in group
        assert "--place-within" in group
        assert placement_groups() == []

    def test_more_gpus_than_ray_can_ever_have_are_told_at_once(self, tmp_path: Path) -> None:
        summary = run_sweep(
            [named("group", device="cuda", tensor_parallel=4, replicate_attention=True), named("complete")],
            str(tmp_path),
            show=quiet()[0],
            work="fake_work:by_name",
        )
        assert {i.name: i.state for i in summary.items} == {"group": "failed", "complete": "complete"}
        assert "asks for 4 GPU on one node; the largest node of this Ray has 2" in errors_of(summary)["group"]


class _Holder:
    def here(self) -> bool:
        return True


def test_a_bug_in_looking_at_one_entry_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_work

    def resolve(entry: Any, *, download: bool) -> Any:
        if entry.name == "odd":
            raise RuntimeError("a bug")
        return fake_work_resolve(entry, download=download)

    fake_work_resolve = fake_work.resolve
    monkeypatch.setattr(fake_work, "resolve", resolve)
    checked = [(name, make_entry(name)) for name in ("odd", "even")]
    items = plan(checked, RunDir(str(tmp_path)), force=False, resolve="fake_work:resolve")
    assert [(item.name, item.state) for item in items] == [("odd", "planned"), ("even", "planned")]
    assert items[1].capture is not None
