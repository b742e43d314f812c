"""Results that are taken in agree with their schema, and the page is made of them alone."""

import json

import measured
import page
import pytest
from measured import Bench, figure, in_turns, met, ratios, wrong_result


def result(**fields):
    bench = Bench("ray", "make bench-ray", threads=2)
    bench.add("a", "what it is", [1.0, 3.0, 2.0], over="the floor", bar=2.0)
    return bench.result() | fields


def test_what_is_committed_agrees_with_the_schema():
    results = page.read()
    assert [fault for one in results for fault in wrong_result(one)] == []
    assert len({(one["bench"], one["machine"]["cpu"]) for one in results}) == len(results)
    assert page.PAGE.read_text(encoding="utf-8") == page.benchmarks_page(results), "run: make bench-docs"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"date": None}, "date is None"),
        ({"figures": [{"name": "x"}]}, "lacks 'median'"),
        ({"machine": {}}, "lacks 'cpu'"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_a_result_that_does_not_agree_is_refused(change, fault, tmp_path):
    assert any(fault in one for one in wrong_result(result(**change)))
    file = tmp_path / "ray.json"
    file.write_text(json.dumps(result(**change)))
    with pytest.raises(ValueError, match=str(file)):
        page.collect([], [file])


def test_two_figures_of_one_name_are_refused():
    one = result()
    one["figures"] *= 2
    assert wrong_result(one) == ["ray: two figures are named 'a'"]


def test_a_new_result_takes_the_place_of_the_one_before(tmp_path):
    file = tmp_path / "ray.json"
    file.write_text(json.dumps(result(date="2030-01-01")))
    found = page.collect([result(), result(bench="plan")], [file])
    assert [(r["bench"], r["date"][:4] == "2030") for r in found] == [("ray", True), ("plan", False)]


def test_figures_that_a_new_result_lacks_stay_and_say_from_when_they_are(tmp_path):
    old = result(date="2030-01-01", code="abc1234")
    other = old["figures"][0] | {"name": "b", "note": "quiet"}
    file, found = tmp_path / "ray.json", [old | {"figures": [*old["figures"], other]}]
    for date in ("2030-01-02", "2030-01-03"):
        file.write_text(json.dumps(result(date=date)))
        found = page.collect(found, [file])
    (one,) = found
    assert [(f["name"], f["note"]) for f in one["figures"]] == [
        ("a", ""),
        ("b", "quiet; measured on 2030-01-01 at abc1234"),
    ]
    assert one["date"] == "2030-01-03"


def test_a_figure_that_changed_by_more_than_a_tenth_is_told_with_what_it_was():
    old, new = result(code="abc1234"), result(code="def5678")
    assert page.changes([old], [new]) == []
    new["figures"][0]["median"] = 2.21
    assert page.changes([old], [new]) == ["ray: what it is: 2 (abc1234) -> 2.21x"]
    other = new["machine"] | {"cpu": "another one"}
    assert page.changes([old], [new | {"machine": other}]) == [], "nothing is known of that one"


def test_the_table_of_bars_says_from_when_its_figures_are():
    old = result(date="2030-01-02", code="abc1234")
    old["figures"].append(old["figures"][0] | {"name": "b", "note": "quiet; measured on 2029-12-31 at 0123abc+"})
    text = page.benchmarks_page([old, result(bench="plan", date="2030-02-01", code="def5678")])
    place = old["machine"]["cpu"]
    assert f"- {place}: measured on 2029-12-31 (0123abc+), 2030-01-02 (abc1234), 2030-02-01 (def5678)\n" in text


def test_results_of_two_processors_stand_side_by_side_under_one_title_the_newest_first(tmp_path):
    old = result(date="2030-01-01")
    file = tmp_path / "ray.json"
    file.write_text(json.dumps(result(date="2031-01-01", machine=old["machine"] | {"cpu": "another one"})))
    found = page.collect([old], [file])
    assert [r["machine"]["cpu"] for r in found] == ["another one", old["machine"]["cpu"]]
    text = page.benchmarks_page(found)
    assert text.count(page.TITLES["ray"]) == 1
    first, second = (text.index(f"{r['date']}, code {r['code']}; {r['machine']['cpu']}") for r in found)
    assert 0 < first < second


def test_of_bytes_which_are_the_same_anywhere_the_newest_result_alone_is_kept(tmp_path):
    one = result(bench="storage", date="2030-01-01")
    other = result(bench="storage", date="2031-01-01", machine=one["machine"] | {"cpu": "another one"})
    assert page.collect([other, one], []) == [other]
    file = tmp_path / "storage.json"
    file.write_text(json.dumps(one | {"date": "2032-01-01"}))
    assert [r["date"] for r in page.collect([other, one], [file])] == ["2032-01-01"]


def test_the_page_tells_what_is_met_and_what_is_missed_and_where_it_was_measured():
    one = result()
    one["figures"] = [
        figure("a", "kept", [1.0, 3.0, 2.0], over="the floor", bar=2.0),
        figure("b", "too slow", [2.5], bar=2.0, note="a reason"),
        figure("c", "enough", [11.0, 13.0], bar=12.0, want="least", unit="MB"),
        figure("d", "just seen", [0.25], unit="s"),
    ]
    text = page.benchmarks_page([one])
    assert "| kept | the floor | at most 2x | 2x | 1 to 3 | 3 | met |" in text
    assert "| too slow |  | at most 2x | 2.5x |  | 1 | **MISSED**, one round |" in text
    assert "| enough |  | at least 12 MB | 12 MB | 11 to 13 | 2 | met |" in text
    assert "| just seen |  |  | 0.25 s |  | 1 |  |" in text
    assert "- too slow: a reason" in text
    assert f"{one['machine']['cores']} cores" in text
    assert "never run on a GPU" in text


def test_all_bars_stand_in_one_table_with_a_column_for_each_processor():
    one, other = result(), result()
    one["figures"] = [figure("a", "kept", [1.0, 3.0], over="the floor", bar=2.0), figure("d", "just seen", [0.25])]
    other["figures"] = [figure("a", "kept", [2.5], over="the floor", bar=2.0)]
    other["machine"] = other["machine"] | {"cpu": "another one"}
    text = page.benchmarks_page([one, other])
    assert f"| what | bar | {one['machine']['cpu']} | another one |" in text
    assert "| kept over the floor | at most 2x | 2 | **(2.5)** |" in text


def test_a_file_that_is_older_than_what_is_known_is_left_out(tmp_path, capsys):
    file = tmp_path / "ray.json"
    file.write_text(json.dumps(result(date="2020-01-01", figures=[])))
    known = result()
    assert page.collect([known], [file]) == [known]
    assert "older than what the page has" in capsys.readouterr().out


def test_a_bench_that_measured_nothing_writes_nothing(tmp_path):
    assert Bench("ray", "make bench-ray").write(tmp_path / "ray.json") == 2
    assert not (tmp_path / "ray.json").exists()


def test_numbers_that_make_no_sense_are_refused_before_anything_is_made(capsys):
    import bench_capture

    for words in (["--rounds", "0"], ["--threads", "-1"], ["--rounds", "many"], ["--cases", "13"]):
        with pytest.raises(SystemExit):
            bench_capture.main(words)
    assert "0 is below 1" in capsys.readouterr().err


def test_a_bench_that_missed_a_bar_says_so_and_exits_with_1(tmp_path, capsys):
    bench = Bench("ray", "make bench-ray")
    bench.add("slow", "it", [3.0], bar=2.0)
    assert bench.write(tmp_path / "ray.json") == 1
    assert "MISSED: slow" in capsys.readouterr().out
    assert wrong_result(json.loads((tmp_path / "ray.json").read_text())) == []


def test_parts_run_in_turns_and_the_first_round_does_not_count():
    order = []
    seconds = in_turns({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert seconds["a"] == [1.0, 1.0]
    assert len(seconds["b"]) == 2
    assert all(s < 1 for s in seconds["b"])


def test_a_figure_without_a_bar_is_neither_met_nor_missed():
    assert met(figure("a", "it", ratios([4.0, 6.0], [2.0, 2.0]))) is None
    assert measured.round_to(0.000123456) == 0.0001235
