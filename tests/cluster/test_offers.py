"""Machines: the assumed ones, Vast's rows with their units, and lists that cannot be read."""

from __future__ import annotations

import json

import pytest

from capture.errors import ConfigError
from cluster.offers import assumed_offers, live_offers, prices, read_offers, vast_offers
from cluster.plan_facts import CONFIGS

ROW = {
    "id": 7, "gpu_name": "A100 PCIE", "num_gpus": 2, "gpu_ram": 40960, "dph_base": 1.5, "dph_total": 1.6, "inet_down": 2500,
    "inet_down_cost": 0.002, "disk_space": 900, "disk_bw": 2000, "storage_cost": 0.2, "pcie_bw": 12.5, "compute_cap": 800,
    "total_flops": 60, "geolocation": "Norway",
}  # fmt: skip


def test_an_assumed_machine_costs_its_gpus():
    offers = {(o.gpu, o.memory_mib, o.gpus): o for o in assumed_offers(prices())}
    assert offers["RTX 4090", 24564, 8].usd_per_hour == pytest.approx(8 * offers["RTX 4090", 24564, 1].usd_per_hour)
    assert ("A100 SXM4", 40960, 1) in offers
    assert ("A100 SXM4", 81920, 1) in offers


def test_usable_memory_leaves_room_for_the_context():
    card = next(o for o in assumed_offers(prices()) if o.gpu == "RTX 4090")
    assert card.usable_bytes == pytest.approx(23_984_504_238, abs=1)
    assert card.title == "RTX 4090 24G"


def test_the_network_can_be_told():
    assert {o.gbit for o in assumed_offers(prices(), 10.0)} == {10.0}


def test_a_row_of_vast_is_read_in_its_own_units():
    (offer,) = vast_offers([ROW], prices(), "list")
    assert (offer.gpu, offer.gpus, offer.memory_mib, offer.offer_id) == ("A100 PCIE", 2, 40960, 7)
    assert (offer.gbit, offer.usd_per_gb, offer.disk_gb, offer.disk_speed) == (2.5, 0.002, 900, 2.0)
    assert (offer.usd_per_hour, offer.usd_per_gb_month, offer.pcie) == (1.5, 0.2, 12.5)
    assert offer.tflops.half == 180  # known by its other name


def test_a_card_that_is_not_in_the_prices_goes_by_what_vast_says_of_it():
    (offer,) = vast_offers([ROW | {"gpu_name": "RTX 5070"}], prices(), "list")
    assert offer.tflops.half == offer.tflops.single == 15


def test_a_saved_list_is_read_with_or_without_its_wrapping(tmp_path):
    for content in ([ROW], {"offers": [ROW]}):
        (tmp_path / "o.json").write_text(json.dumps(content))
        (offer,) = read_offers(tmp_path / "o.json", prices())
        assert offer.offer_id == 7


def test_a_machine_without_a_gpu_in_a_saved_list_is_passed_over():
    assert [o.gpus for o in vast_offers([ROW | {"num_gpus": 0}, ROW], prices(), "list")] == [2]


def test_a_row_without_a_price_is_named(tmp_path):
    broken = {k: v for k, v in ROW.items() if not k.startswith("dph")}
    (tmp_path / "o.json").write_text(json.dumps([ROW, broken]))
    with pytest.raises(ConfigError, match=r"offer 1 lacks 'dph_total'"):
        read_offers(tmp_path / "o.json", prices())


@pytest.mark.parametrize("content", ["{", '"text"', '{"nothing": 1}'])
def test_a_file_that_is_no_list_is_refused(content, tmp_path):
    (tmp_path / "o.json").write_text(content)
    with pytest.raises(ConfigError, match="--offers"):
        read_offers(tmp_path / "o.json", prices())


def test_prices_that_lack_a_key_are_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("network: {gbit: 1}\n")
    with pytest.raises(ConfigError, match=r"network\.usd_per_gb"):
        read_offers(tmp_path / "p.yaml", prices())


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("usd_per_hour: 0.15", "usd_per_hour: 0,15", r"the GPU 'Tesla T4': 'usd_per_hour' is a number from 0 up, with a point, not '0,15'"),
        ("usd_per_hour: 0.15", "usd_per_hour: -0.15", r"'usd_per_hour' is a number from 0 up"),
        ("usd_per_hour: 0.15", "price: 0.15", r"'usd_per_hour' is a number from 0 up, with a point, not None"),
        ("{half: 20, tf32: 4", "{halb: 20, tf32: 4", r"'tflops: half' is a number"),
        ("{half: 20, tf32: 4", "{half: 20, fp8: 40, tf32: 4", r"tflops or also is not as in configs/prices.yaml \['fp8'\]"),
        ("- name: Tesla T4", "- name:", r"is no GPU with a name"),
        ("gbit: 1 ", "gbit: .nan ", r"network\.gbit is missing or no number"),
    ],
)  # fmt: skip
def test_a_price_that_was_mistyped_is_named(tmp_path, right, wrong, said):
    text = (CONFIGS / "prices.yaml").read_text()
    assert right in text
    (tmp_path / "p.yaml").write_text(text.replace(right, wrong, 1))
    with pytest.raises(ConfigError, match=said):
        read_offers(tmp_path / "p.yaml", prices())


def test_live_offers_come_through_the_one_place_that_talks_to_vast(monkeypatch):
    asked = []

    class Fake:
        def search(self, query, *, bid, disk_gb):
            asked.append((query["num_gpus"], query["gpu_ram"], bid, disk_gb))
            return [ROW | {"id": len(asked)}]

    monkeypatch.setattr("cluster.vast.api.Vast", Fake)
    offers = live_offers(prices(), 30.0)
    assert [o.offer_id for o in offers] == [1, 2, 3, 4]
    assert {a[2:] for a in asked} == {(False, 30.0)}
