"""Files of residual comparisons in and out: nothing is lost, whatever was read before a break is kept."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seed_files import record, single, write
from synthetic import alpha, keep_layers, write_capture

import analysis.json_stream
from analysis import build_residual_grid, build_run_grid, open_run
from analysis.json_file import JsonFile
from analysis.json_import import pair_of
from analysis.json_stream import BrokenJson, JsonStream
from capture.layout import RunDir


def two_records() -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [record(rng, 0, ["Ġa", "\n", "界"]), record(rng, 3, ["x", '"<script>'])]


def round_trip(call: Callable[..., Any], path: Path, tmp: Path) -> Any:
    """The records that an export gives of a capture that a file became."""
    answer = call("import-json", path, "--out", tmp / "out", "--pair", "p")
    assert answer.code == 0, answer.err
    assert call("export-json", tmp / "out", "--pair", "p", "-o", tmp / "back.json").code == 0
    return json.loads((tmp / "back.json").read_text(encoding="utf-8"))


def test_a_file_comes_back_as_it_was(call: Callable[..., Any], tmp_path: Path) -> None:
    records = two_records()
    assert round_trip(call, write(tmp_path / "f.json", records), tmp_path) == records


def test_the_older_format_comes_back_as_it_was(call: Callable[..., Any], tmp_path: Path) -> None:
    rng = random.Random(2)
    records = [single(rng, 0, ["a", "b"], "identity"), single(rng, 0, ["b", "a"], "mirror_halves"),
               single(rng, 0, ["a", "b"], "identity", embeddings="base")]  # fmt: skip
    assert round_trip(call, write(tmp_path / "f.json", records), tmp_path) == records
    con = open_run(str(tmp_path / "out"))
    found = con.execute("SELECT variant, base_run, sft_run FROM pairwise GROUP BY ALL ORDER BY ALL").fetchall()
    assert found == [("identity", "BB", "SS"), ("identity+to-base", "BB", "BS"), ("mirror_halves", "BB", "SS")]
    norms = con.execute("SELECT norm_base FROM pairwise_full WHERE variant = 'identity' AND layer = 0 AND position = 1")
    assert norms.fetchall() == [(np.float32(records[0]["layers"]["0"]["1"]["norm_base"]),)]


def test_a_record_without_passes_or_comparisons_comes_back_without(call: Callable[..., Any], tmp_path: Path) -> None:
    records = [*two_records(), record(random.Random(2), 4, ["y"])]
    records[0]["runs"] = []
    records[1]["pairwise"] = []
    assert round_trip(call, write(tmp_path / "f.json", records), tmp_path) == records


def test_two_comparisons_of_the_same_passes_are_two(call: Callable[..., Any], tmp_path: Path) -> None:
    records = two_records()
    (other,) = [p for p in record(random.Random(3), 0, ["Ġa", "\n", "界"])["pairwise"] if p["name"] == "BB-SS"]
    records[0]["pairwise"].append(other | {"name": "BB-SS with another unembedding"})
    assert round_trip(call, write(tmp_path / "f.json", records), tmp_path) == records
    con = open_run(str(tmp_path / "out"))
    found = con.execute(
        "SELECT comparison, count(*) FROM pairwise WHERE base_run = 'BB' AND prompt_idx = 0 GROUP BY ALL"
    )
    assert sorted(found.fetchall()) == [("BB-BS", 9), ("BB-SB", 9), ("BB-SS", 9), ("BB-SS#2", 9)]
    assert call("export-json", tmp_path / "out", "--single", "BB-SS#2", "-o", tmp_path / "one.json").code == 0
    assert json.loads((tmp_path / "one.json").read_text())[0]["layers"] == other["layers"]


def test_strange_cells_come_back_as_they_were(call: Callable[..., Any], tmp_path: Path) -> None:
    records = two_records()
    layers = records[0]["runs"][1]["layers"]
    layers["0"]["0"] = {"token": "other", "norm": 3, "new_key": [1, {"a": None}], "entropy": float("nan")}
    layers["0"]["1"] |= {"norm": 1e300, "norm_delta": float("-inf"), "top_k_logits": None, "tracked_token_logits": {}}
    layers["1"]["0"] |= {"tracked_token_logits": {"x": 1, "42": None}, "cosine_prev": "none", "norm": True}
    del records[1]["pairwise"][2]["layers"]["1"]["0"]["top_k_increased"]
    records[1]["pairwise"][2]["layers"]["1"]["0"]["top_k_decreased"] = {"indices": [2**40], "values": [1.0]}
    records[1]["pairwise"] = records[1]["pairwise"][:3]
    records[0]["extra"] = {"runs": []}
    records[0]["runs"][2]["layers"] = None
    back = round_trip(call, write(tmp_path / "f.json", records), tmp_path)
    comparable = [json.loads(json.dumps(r), parse_constant=str) for r in (back, records)]  # NaN is not itself
    assert comparable[0] == comparable[1]


@pytest.mark.parametrize(("ids", "values"), [([True, 2], [1.5, 1.0]), ([1, 2], [True, 0.5])])
def test_a_truth_value_among_numbers_does_not_stop_an_import(
    call: Callable[..., Any], tmp_path: Path, ids: list[Any], values: list[Any]
) -> None:
    records = two_records()
    records[0]["runs"][0]["layers"]["0"]["0"]["top_k_logits"] = {"indices": ids, "values": values}
    back = round_trip(call, write(tmp_path / "f.json", records), tmp_path)
    assert json.dumps(back, sort_keys=True) == json.dumps(records, sort_keys=True)  # true is equal to 1 elsewhere


def test_halves_of_surrogate_pairs_come_back_as_they_were(call: Callable[..., Any], tmp_path: Path) -> None:
    odd = "a\ud83d\udc4d\ud83d"
    records = two_records()
    records[0] |= {"prompt": odd, "tokens": [odd, "\ud83d", "界"], odd: {"x": [odd]}}
    records[0]["metadata"] |= {"variant_name": odd, "embedding_variant": "\udfff"}
    records[0]["runs"][1]["name"] = records[0]["pairwise"][0]["sft_run"] = odd
    records[1]["runs"][0]["layers"]["0"]["0"] |= {"token": odd, odd: odd, "tracked_token_logits": {odd: 1}}
    records[1]["pairwise"][0]["layers"]["0"]["0"]["token"] = "\ud83d"
    for part in (*records[0]["runs"], *records[0]["pairwise"]):
        for cells in part["layers"].values():
            cells["0"]["token"], cells["1"]["token"] = odd, "\ud83d"
    read = json.loads(json.dumps(records))  # pairs are one letter again
    assert round_trip(call, write(tmp_path / "f.json", read), tmp_path) == read
    con = open_run(str(tmp_path / "out"))
    held = "a\U0001f44d\ufffd"
    assert con.execute("SELECT text, variant FROM prompts WHERE prompt_idx = 0").fetchall() == [(held, held)]
    assert con.execute("SELECT token FROM tokens WHERE prompt_idx = 0 ORDER BY position").fetchall() == [(held,), ("\ufffd",), ("界",)]  # fmt: skip
    assert con.execute("SELECT count(*) FROM runs WHERE run = ?", [held]).fetchall() == [(9,)]


@pytest.mark.parametrize("key", ["²", "--5", "-", "9" * 5000, "٣", "0042", " 7"])
def test_what_is_no_id_of_a_token_comes_back_as_it_was(call: Callable[..., Any], tmp_path: Path, key: str) -> None:
    records = two_records()
    records[0]["runs"][0]["layers"]["0"]["0"]["tracked_token_logits"][key] = 1.5
    records[0]["pairwise"][0]["layers"]["0"]["0"]["tracked_token_logits"][key] = {"base": 1.5, "sft": 2.0}
    records[1]["runs"][0]["layers"]["0"]["0"] |= {"norm": 10**400, "cosine_prev": 10**400}
    assert round_trip(call, write(tmp_path / "f.json", records), tmp_path) == records


def test_a_number_of_thousands_of_digits_ends_what_is_read_and_other_files_are_read(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    text = json.dumps(two_records())
    (tmp_path / "long.json").write_text(text.replace('"prompt_idx": 3', f'"prompt_idx": {"9" * 5000}'))
    (tmp_path / "good.json").write_text(text)
    answer = call("import-json", tmp_path / "long.json", tmp_path / "good.json", "--out", tmp_path / "out")
    assert answer.code == 1
    assert "a number has too many digits" in answer.err
    assert "good.json: pair good" in answer.out


@pytest.mark.parametrize(
    "how", [{"sort_keys": True}, {"indent": None, "separators": (",", ":")}, {"ensure_ascii": False}]
)
def test_the_order_of_keys_and_the_spaces_do_not_matter(
    call: Callable[..., Any], tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis.json_stream, "CHUNK", 997)  # values lie across the ends of what is read at a time
    records = two_records()
    assert round_trip(call, write(tmp_path / "f.json", records, **how), tmp_path) == records


def test_an_imported_capture_answers_questions(call: Callable[..., Any], tmp_path: Path) -> None:
    records = two_records()
    round_trip(call, write(tmp_path / "f.json", records), tmp_path)
    con = open_run(str(tmp_path / "out"))
    grid = build_run_grid(con, "entropy", pair="p", prompt=0, run="SB")
    assert grid.layers.tolist() == [0, 1, 3], "the file's last layer is the state after the final norm"
    said = records[0]["runs"][2]["layers"]
    assert np.allclose(grid.values, [[said[k][i]["entropy"] for i in "012"] for k in "012"], rtol=1e-7)
    assert grid.tokens == ("Ġa", "\n", "界")
    kl = build_residual_grid(con, "kl_div", pair="p", prompt=3, comparison="BS-SB")
    said = records[1]["pairwise"][3]["layers"]
    assert np.allclose(kl.values, [[said[k][i]["kl_div"] for i in "01"] for k in "012"], rtol=1e-7)
    cosine = build_residual_grid(con, "cosine_sim", pair="p", prompt=3, comparison="BS-SB")
    assert np.allclose(cosine.values, [[said[k][i]["cosine_sim"] for i in "01"] for k in "012"], rtol=0, atol=1.2e-7)
    top = con.execute(
        "SELECT token_id, logit FROM topk WHERE prompt_idx = 0 AND run = 'BB' AND layer = 1 AND position = 2 ORDER BY rank"
    ).fetchall()
    cell = records[0]["runs"][0]["layers"]["1"]["2"]["top_k_logits"]
    assert top == list(zip(cell["indices"], [np.float32(v) for v in cell["values"]], strict=True))
    logits = con.execute(
        "SELECT token_id, logit FROM tracked WHERE prompt_idx = 0 AND run = 'SS' AND layer = 0 AND position = 0 ORDER BY 1"
    ).fetchall()
    cell = records[0]["runs"][3]["layers"]["0"]["0"]["tracked_token_logits"]
    assert logits == [(7, 0.5), (42, np.float32(cell["42"]))]
    assert con.execute("SELECT n_layers, n_prompts, lens_norm FROM captures").fetchall() == [(3, 2, "none")]
    assert call("report", tmp_path / "out", "--metric", "kl_div").code == 0


def test_a_capture_goes_out_and_comes_back(call: Callable[..., Any], tmp_path: Path) -> None:
    made = alpha()
    write_capture(tmp_path / "out", made)
    assert call("export-json", tmp_path / "out", "-o", tmp_path / "a.json").code == 0
    records = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [r["prompt"] for r in records] == ["<s> a\n long-token界", "<s> bc"]
    assert [r["name"] for r in records[0]["runs"]] == ["BB", "BS", "SB", "SS"]
    assert [(r["model"], r["embedding_source"]) for r in records[0]["runs"]][1:3] == [("sft", "base"), ("base", "sft")]
    assert len(records[0]["pairwise"]) == 6
    run = records[0]["runs"][1]["layers"]
    assert list(run) == ["0", "1"], "two blocks: the first one's output, and the state after the final norm"
    ss = made.cells[0, "identity", "BS"]
    assert run["1"]["2"]["norm"] == ss["norm"][3, 2]
    assert run["1"]["2"]["norm_delta"] == float(ss["norm"][3, 2]) - float(ss["norm"][1, 2])
    assert run["1"]["2"]["cosine_prev"] is None
    assert run["0"]["2"]["norm_delta"] == ss["norm_delta"][1, 2]
    pair = records[1]["pairwise"][2]["layers"]["0"]["1"]
    cells = made.cells[1, "identity", "BB-SS"]
    assert pair["norm_diff"] == cells["norm_diff"][1, 1]
    assert pair["cosine_sim"] == 1 - float(cells["cosine_distance"][1, 1])
    assert np.array_equal(np.float32(pair["top_k_decreased"]["values"]), cells["decreased"][1, 1])
    assert pair["tracked_token_logits"]["7"]["sft"] == made.cells[1, "identity", "SS"]["tracked_logits"][1, 1, 0]
    assert call("import-json", tmp_path / "a.json", "--out", tmp_path / "again", "--pair", "alpha").code == 0
    sql = (
        "SELECT prompt_idx, run, layer, position, norm, entropy, tracked_logits, ids, logits FROM runs JOIN runs_topk "
        "USING (pair, capture, prompt_idx, variant, run, layer, position) WHERE layer NOT IN (-1, 1) ORDER BY ALL"
    )
    here, there = (open_run(str(tmp_path / d)).execute(sql).fetchall() for d in ("out", "again"))
    assert here == there
    assert len(here) == 4 * 2 * 8


@pytest.mark.parametrize(("kept", "back"), [((-1, 0), [0]), ((0, 1, 2), [0, 2]), ((2,), [2])])
def test_layers_of_a_capture_that_has_some_alone_come_back_as_the_same(
    call: Callable[..., Any], tmp_path: Path, kept: tuple[int, ...], back: list[int]
) -> None:
    write_capture(tmp_path / "out", keep_layers(alpha(), *kept))
    for file, options in (("all.json", ()), ("one.json", ("--single", "BB-SS"))):
        assert call("export-json", tmp_path / "out", *options, "-o", tmp_path / file).code == 0
        assert call("import-json", tmp_path / file, "--out", tmp_path / "again").code == 0
        sql = f"SELECT layer, sum(norm_diff) FROM pairwise WHERE layer IN {(*back, -9)} AND comparison = 'BB-SS' GROUP BY 1 ORDER BY 1"
        here = open_run(str(tmp_path / "out")).execute(sql).fetchall()
        con = open_run(str(tmp_path / "again"))
        pair = file.removesuffix(".json")
        assert con.execute(sql.replace("WHERE", f"WHERE pair = '{pair}' AND")).fetchall() == here
        assert con.execute("SELECT n_layers FROM captures WHERE pair = ?", [pair]).fetchall() == [(2,)]
        assert call("export-json", tmp_path / "again", "--pair", pair, "-o", tmp_path / "e.json").code == 0
        assert (tmp_path / "e.json").read_bytes() == (tmp_path / file).read_bytes()


def test_a_capture_in_a_store_goes_out_as_from_a_disk(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_capture(tmp_path / "out", alpha())
    assert call("export-json", tmp_path / "out", "-o", tmp_path / "here.json").code == 0
    monkeypatch.setattr(RunDir, "is_local", False)
    assert call("export-json", tmp_path / "out", "-o", tmp_path / "there.json").code == 0
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()


def test_what_is_no_finite_number_goes_out_as_null_or_not_at_all(call: Callable[..., Any], tmp_path: Path) -> None:
    made = alpha()
    for odd, layer in ((np.inf, 1), (-np.inf, 3)):
        run, pair = made.cells[0, "identity", "BB"], made.cells[0, "identity", "BB-SS"]
        for cells, columns in ((run, ("norm", "norm_delta", "entropy")), (pair, ("norm_diff", "kl_divergence"))):
            for column in columns:
                cells[column][layer, 2] = odd
        run["logits"][layer, 2, 0] = run["tracked_logits"][layer, 2, 0] = pair["increased"][layer, 2, 1] = odd
    write_capture(tmp_path / "out", made)
    assert call("export-json", tmp_path / "out", "-o", tmp_path / "a.json").code == 0
    records = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    for layer in "01":
        cell = records[0]["runs"][0]["layers"][layer]["2"]
        assert (cell["norm"], cell["entropy"], cell["top_k_logits"]["values"][0]) == (None, None, None)
        assert list(cell["tracked_token_logits"]) == ["9"]
        both = next(p for p in records[0]["pairwise"] if p["name"] == "BB-SS")["layers"][layer]["2"]
        assert (both["norm_diff"], both["kl_div"], both["norm_base"], both["top_k_increased"]["values"][1]) == (None,) * 4  # fmt: skip


def test_one_comparison_goes_out_in_the_older_format(call: Callable[..., Any], tmp_path: Path) -> None:
    write_capture(tmp_path / "out", alpha())
    answer = call("export-json", tmp_path / "out", "--prompt", 1, "--single", "BS-SB", "-o", tmp_path / "a.json")
    assert answer.code == 0
    (one,) = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert "format_version" not in one
    assert one["swap_options"]["sft"] == {"embedding_source": "sft", "unembedding_source": "base"}
    assert set(one["layers"]) == {"0", "1"}
    assert (
        "no comparison 'BB' here" in call("export-json", tmp_path / "out", "--single", "BB", "-o", tmp_path / "x").err
    )


def test_one_comparison_of_an_imported_file_goes_out_alone(call: Callable[..., Any], tmp_path: Path) -> None:
    file = write(tmp_path / "f.json", two_records())
    assert call("import-json", file, "--out", tmp_path / "out").code == 0
    assert call("export-json", tmp_path / "out", "--single", "BS-SB", "-o", tmp_path / "a.json").code == 0
    records = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    for one, whole in zip(records, json.loads(file.read_text(encoding="utf-8")), strict=True):
        assert ("layers" in one, "format_version" in one, "runs" in one) == (True, False, False)
        assert one["layers"] == next(p for p in whole["pairwise"] if p["name"] == "BS-SB")["layers"]


def test_several_captures_need_a_directory_that_can_be_made(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert "is a file, and 2 captures" in call("export-json", synthetic.out, "-o", tmp_path / "file").err
    answer = call("export-json", synthetic.out, "-o", tmp_path / "file" / "all")
    assert (answer.code, "cannot make the directory" in answer.err) == (1, True)
    assert call("export-json", synthetic.out, "-o", tmp_path / "all").code == 0
    assert len(list((tmp_path / "all").iterdir())) == 2


def test_a_comparison_of_passes_with_hyphens_goes_out_alone(call: Callable[..., Any], tmp_path: Path) -> None:
    records = two_records()
    for one in records:
        for part in one["runs"]:
            part["name"] = f"my-{part['name']}"
        for part in one["pairwise"]:
            part |= {side: f"my-{part[side]}" for side in ("base_run", "sft_run")}
    round_trip(call, write(tmp_path / "f.json", records), tmp_path)
    assert call("export-json", tmp_path / "out", "--single", "my-BB-my-SS", "-o", tmp_path / "one.json").code == 0
    (first, second) = json.loads((tmp_path / "one.json").read_text())
    assert [first["layers"], second["layers"]] == [
        next(p["layers"] for p in r["pairwise"] if (p["base_run"], p["sft_run"]) == ("my-BB", "my-SS")) for r in records
    ]


def test_a_file_cut_anywhere_keeps_what_came_before(call: Callable[..., Any], tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.json", two_records()).read_bytes()
    cells = []
    for i, share in enumerate((0.02, 0.3, 0.55, 0.8, 0.999)):
        path = tmp_path / f"cut{i}.json"
        path.write_bytes(whole[: int(len(whole) * share)])
        answer = call("import-json", path, "--out", tmp_path / "out")
        assert answer.code == 1
        assert f"cut{i}.json' is not whole: the file ends" in answer.err
        assert "kept" in answer.err
        con = open_run(str(tmp_path / "out"))
        counts = con.execute(
            "SELECT (SELECT count(*) FROM runs WHERE pair = ?) + (SELECT count(*) FROM pairwise WHERE pair = ?)",
            [f"cut{i}", f"cut{i}"],
        ).fetchall()
        cells.append(counts[0][0])
    assert cells == sorted(cells)
    assert cells[0] > 0
    assert cells[-1] == 10 * 3 * 5 - 1, "all but the one that is cut"
    (said,) = con.execute(
        "SELECT json_extract_string(json, '$.imported.cut_short') FROM captures WHERE pair = 'cut1'"
    ).fetchall()
    assert "the file ends" in said[0]
    assert call("import-json", tmp_path / "cut1.json", "--out", tmp_path / "out").code == 1, "it is read again"


def test_a_layer_is_the_last_only_where_that_is_known(call: Callable[..., Any], tmp_path: Path) -> None:
    text = write(tmp_path / "f.json", two_records()).read_bytes()
    path = tmp_path / "cut.json"
    path.write_bytes(text[: text.index(b'"2": {', text.index(b'"1": {', text.index(b'"layers"')))])
    assert call("import-json", path, "--out", tmp_path / "out").code == 1
    layers = open_run(str(tmp_path / "out")).execute("SELECT DISTINCT layer FROM runs ORDER BY 1").fetchall()
    assert layers[:2] == [(0,), (1,)] or layers == [(0,)]


def test_status_says_that_a_file_was_cut_short_and_in_which_prompt(call: Callable[..., Any], tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.json", two_records())
    text = whole.read_text(encoding="utf-8")
    half = text.index('"pairwise"', text.index('"pairwise"') + 1)  # within the record of prompt 3
    (tmp_path / "cut.json").write_text(text[:half], encoding="utf-8")
    assert call("import-json", whole, "--out", tmp_path / "out").code == 0
    assert call("import-json", tmp_path / "cut.json", "--out", tmp_path / "out").code == 1
    cut, good = call("status", tmp_path / "out", "--json").rows
    assert (good["entry"], good["error"]) == ("whole", None)
    assert cut["entry"] == "cut"
    assert re.fullmatch(r"cut short: .* at character \d+.*; prompt 3 is not whole", cut["error"]), cut["error"]
    assert "cut short: " in call("status", tmp_path / "out").out
    (said,) = (tmp_path / "out").glob("captures/pair=cut/*/capture.json")
    imported = json.loads(said.read_text())["imported"]
    assert imported["cut_short"] in cut["error"]
    assert imported["incomplete_prompts"] == [{"prompt_idx": 3, "variant": "identity"}]
    again = call("import-json", tmp_path / "cut.json", "--out", tmp_path / "out", "--json")
    assert (again.code, again.rows[0]["state"]) == (1, "broken")
    again = call("import-json", whole, "--out", tmp_path / "out", "--json")
    assert (again.code, again.rows[0]["state"]) == (0, "there")


def test_the_same_file_is_imported_once(call: Callable[..., Any], tmp_path: Path) -> None:
    path = write(tmp_path / "multi_pass_20251127_032925_gpt2_to_gpt2.json", two_records())
    first = call("import-json", path, "--out", tmp_path / "out", "--json").rows[0]
    assert (first["state"], first["pair"], first["records"], first["cells"]) == ("imported", "gpt2_to_gpt2", 2, 150)
    again = call("import-json", path, "--out", tmp_path / "out", "--json").rows[0]
    assert (again["state"], again["capture"]) == ("there", first["capture"])
    assert call("import-json", path, "--out", tmp_path / "out", "--json", "--force").rows[0]["state"] == "imported"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a list of records should be here"),
        ("[]", "it holds no cell"),
        ("hello", "a list of records should be here"),
        ('[{"layers": {"x": {}}}]', "'x' is no number"),
        ('[{"layers": {"40000": {}}}]', "'40000' is no number"),
        ('[{"layers": {"0": {"0": 5}}}]', "is no object"),
        ('[{"prompt": 1}]', "it holds no cell"),
        ("[1]", "where '{' should be"),
    ],
)
def test_what_is_no_such_file_is_refused(call: Callable[..., Any], tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    answer = call("import-json", path, "--out", tmp_path / "out")
    assert answer.code == 2
    assert said in answer.err
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_file_cannot_steer_the_terminal(call: Callable[..., Any], tmp_path: Path) -> None:
    whole, half = (str(tmp_path / f"{name}\x1b[2J\u202e.json") for name in ("whole", "half"))
    text = write(Path(whole), two_records()).read_text(encoding="utf-8")
    Path(half).write_text(text[: len(text) * 2 // 3], encoding="utf-8")
    answer = call("import-json", whole, half, "--out", tmp_path / "out")
    assert answer.code == 1
    assert "whole\\x1b[2J\\u202e.json: pair" in answer.out
    assert "half\\x1b[2J\\u202e.json' is not whole" in answer.err
    assert "\x1b" not in answer.out + answer.err


def test_a_directory_is_not_called_a_file_that_is_missing(call: Callable[..., Any], tmp_path: Path) -> None:
    answer = call("import-json", tmp_path, "--out", tmp_path / "out")
    assert answer.code == 2
    assert f"'{tmp_path}' is a directory: name the files in it, such as {tmp_path}/*.json" in answer.err


def test_a_missing_file_is_named_and_the_others_are_read(call: Callable[..., Any], tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", two_records())
    assert "there is no file" in call("import-json", tmp_path / "none.json", "--out", tmp_path / "out").err
    answer = call("import-json", tmp_path / "none.json", good, "--out", tmp_path / "out")
    assert answer.code == 1
    assert "there is no file" in answer.err
    assert "good.json: pair good" in answer.out
    assert call("import-json", good, good, "--pair", "x", "--out", tmp_path / "out").code == 2


def test_values_across_the_ends_of_blocks_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1, -2.5e-7, "a\\u00e9\n", True, None, [1, [2]], {"k": "v"}, 123456789, float("inf")]
    text = json.dumps(values).encode()
    for size in range(1, 12):
        monkeypatch.setattr(analysis.json_stream, "CHUNK", size)
        stream = JsonStream(io.BytesIO(text))
        assert [stream.value() for _ in stream.items()] == values
        assert stream.peek() == ""


def test_a_break_in_the_middle_says_where() -> None:
    records = two_records()
    text = json.dumps(records)
    place = text.index('"entropy"', len(text) // 2)
    walk = JsonFile(io.BytesIO((text[:place] + "!" + text[place:]).encode()))
    seen: list[Any] = []
    with pytest.raises(BrokenJson, match=f"no JSON .* at character {place}") as error:
        seen.extend(walk.cells())
    assert error.value.at == place
    assert 0 < len(seen) < 150


def test_a_files_name_gives_the_pair() -> None:
    assert pair_of("residual_compare_20251127_032959_Qwen_0_5B.json") == "Qwen_0_5B"
    assert pair_of("a b?.json") == "a-b"
    assert pair_of("a+b.json") == "a+b", "as a config may name a pair"
    assert pair_of("__a.json") == "a"
    assert pair_of(".json") == "imported"


def test_the_first_record_of_a_file_does_not_say_which_comparisons_the_others_have(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    from analysis.html_data import choose_pairs

    said = [record(random.Random(i), i, ["a", "b"]) for i in range(3)]
    said[0]["pairwise"] = []
    said[1]["pairwise"] = [p for p in said[1]["pairwise"] if (p["base_run"], p["sft_run"]) == ("BB", "SB")]
    out = str(tmp_path / "out")
    assert call("import-json", write(tmp_path / "f.json", said), "--out", out, "--pair", "p").code == 0
    con = open_run(out)
    compared = [name for (name,) in con.execute("SELECT DISTINCT comparison FROM pairwise ORDER BY 1").fetchall()]
    assert len(compared) == 6
    assert choose_pairs(con)[0].comparisons == compared
    sections = call("report", out, "--json").rows
    assert {s["comparison"] for s in sections if s["metrics"][0]["statistics"]} == set(compared)
    assert call("grid", out, "--metric", "norm_diff").out.startswith("norm_diff of BB-SB, pair p, prompt 1")
    assert call("grid", out, "--comparison", "BB-SS", "--metric", "norm_diff").out.startswith(
        "norm_diff of BB-SS, pair p, prompt 2"
    )
    assert call("grid", out, "--run", "BB").out.startswith("norm of BB, pair p, prompt 0")
    assert "no comparison" in call("grid", out, "--prompt", 0).err
