"""The page in a headless Chromium: it opens without a complaint, and every number that it shows is what its SQL says."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from pages import Made
from seed_files import record, write
from synthetic import PASSES, alpha, keep_layers, make_capture, write_capture

from analysis import build_residual_grid, open_run
from analysis.html_page import write_page
from analysis.json_import import import_json


def test_it_opens_without_a_complaint_and_asks_for_nothing_but_itself(made: Made, browser: Browser) -> None:
    browser.open(made.address)
    console, asked = browser.logs()
    assert console == []
    assert asked == [made.address]
    assert browser.text("#grid-title") == "kl_divergence, BB-SS"
    assert browser.execute_script("return S.pair.name") == "alpha"


def test_every_number_of_every_grid_is_what_its_sql_says(made: Made, browser: Browser) -> None:
    browser.open(made.address)
    asked = browser.driver.execute_async_script("""
      const done = arguments[0], found = [];
      (async () => {
        for (const pair of INDEX.pairs) for (const sheet of pair.sheets) {
          const data = await openSheet(pair, sheet);
          for (const view of viewsOf(pair).flatMap(([, l]) => l)) for (const [at, { name }] of metricsOf(pair, view).entries()) {
            // all metrics of a few views, one or another of each other view
            const all = pair === INDEX.pairs[0] && sheet === pair.sheets[0] && ["BB-SS", "SB", "embeddings"].includes(view);
            if (!all && at !== found.length % metricsOf(pair, view).length) continue;
            const values = valuesOf(data, view, name), cells = [];
            for (let i = 0; i < data.n; i++) if (Number.isFinite(values[i]))
              cells.push([data.sheet.layers[Math.floor(i / data.columns)], i % data.columns, values[i]]);
            found.push([SQL.grid({ ...S, pair, sheet, view, metric: name }), viewKind(view), name, cells]);
          }
        }
        done(found);
      })();""")
    assert len(asked) > 60
    for sql, kind, name, cells in asked:
        expected = [row for row in made.con.execute(sql).fetchall() if row[2] is not None]
        assert [c[:2] for c in cells] == [list(row[:2]) for row in expected], sql
        values, there = np.array([c[2] for c in cells]), np.array([row[2] for row in expected])
        halved = kind == "comparison" and name not in ("norm_delta", "entropy_delta") and not name.startswith("logit")
        np.testing.assert_allclose(values, there, rtol=6e-4 if halved else 1e-6, atol=1e-6 * np.abs(there).max(initial=0), err_msg=sql)  # fmt: skip


def test_of_two_layers_of_which_the_lens_says_the_same_one_is_a_hotspot(made: Made, browser: Browser) -> None:
    for metric, both in (("kl_divergence", False), ("norm_diff", True)):
        browser.open(f"{made.address}#pair=it%27s&show=BB-SS&metric={metric}&scope=all")
        layers = browser.execute_script(
            "return hotspots([S.data], S.view, S.metric, null, 'size', 500).map((h) => h.data.sheet.layers[h.row])"
        )
        assert (3 in layers) is both, metric
        assert 2 in layers


@pytest.mark.parametrize("link", ["pair=alpha&show=BB-SS", "pair=alpha&show=SB&metric=entropy&scope=all", "pair=it%27s&show=blocks&metric=norm&mask=1",
                                  "pair=alpha&show=BB-SB&metric=norm_diff&mask=1&scope=all&order=z", "pair=alpha&metric=logit+7&mask=1", "pair=alpha&metric=norm_diff&mask=1&first=2",
                                  "pair=alpha&metric=logit+7&mask=1&first=3&scope=all", "pair=it%27s&show=BB-SS&metric=kl_divergence&scope=all"])  # fmt: skip
def test_hotspots_profile_marginals_and_the_2x2_are_what_their_sql_says(
    made: Made,
    browser: Browser,
    link: str,
) -> None:
    browser.open(f"{made.address}#{link}&cell=1.2")
    ask = lambda name: made.con.execute(browser.text(f"#{name}-sql pre")).fetchall()  # noqa: E731
    spots = browser.execute_script(
        "return S.spots.map((h) => [h.data.sheet.prompt, h.data.sheet.layers[h.row], h.column, h.value, h.z])"
    )
    assert [s[:3] for s in spots] == [list(row[:3]) for row in ask("spots")]
    np.testing.assert_allclose([s[3:] for s in spots], [row[3:] for row in ask("spots")], rtol=2e-3, atol=2e-3)
    found = browser.driver.execute_async_script("""
      const done = arguments[0];
      Promise.all((S.scope === "all" ? sheetsOf(S) : [S.sheet]).map((x) => openSheet(S.pair, x))).then((many) => {
        const p = profile(many, S.view, S.metric, skipped(S));
        const kind = viewKind(S.view) === "comparison" ? EDGES.map((e) => e[0]) : FOUR;
        done([p.layers.map((l, i) => [l, p.p10[i], p.p50[i], p.p90[i]]),
              kind.sort().flatMap((v) => profile(many, v, S.metric, skipped(S)).mean.map((m, i) => [v, p.layers[i], m]))]);
      });""")
    np.testing.assert_allclose(found[0], ask("profile"), rtol=2e-3, atol=1e-6)
    four = ask("four")
    assert [r[:2] for r in found[1]] == [list(row[:2]) for row in four]
    np.testing.assert_allclose([r[2] for r in found[1]], [row[2] for row in four], rtol=2e-3, atol=1e-6)
    row, column = browser.execute_script("""const c = S.cell, n = S.data.columns;
      return [[...S.values.slice(c.row * n, (c.row + 1) * n)], S.data.sheet.layers.map((_, r) => S.values[r * n + c.column])];""")
    np.testing.assert_allclose(row, [value for _, value in ask("by-token")], rtol=1e-3)
    np.testing.assert_allclose(column, [value for _, value in ask("by-layer")], rtol=1e-3)


def test_a_pass_may_have_the_name_of_an_effect(tmp_path: Path, browser: Browser) -> None:
    write_capture(
        tmp_path / "out", make_capture("p", "feed", ("BB", "blocks"), 1, {(0, "identity"): ["a", "b"]}, {1}, 1)
    )
    con = open_run(str(tmp_path / "out"))
    browser.open(f"file://{write_page(con, tmp_path / 'page.html').path}#show=blocks&metric=norm")
    rows = con.execute(browser.text("#grid-sql pre")).fetchall()
    assert browser.text("#grid-title") == "norm, blocks"
    assert browser.execute_script("return Array.from(S.values)") == pytest.approx([value for *_, value in rows])
    assert browser.logs()[0] == []


def test_cells_without_a_number_and_the_masks_are_told(made: Made, browser: Browser) -> None:
    browser.open(f"{made.address}#pair=beta&prompt=0&metric=kl_divergence")
    assert browser.execute_script("return S.values.filter(Number.isFinite).length") == 2, (
        "the lens of beta reads one layer"
    )
    browser.open(f"{made.address}#pair=alpha&mask=1")
    assert browser.execute_script("return S.spots.every((h) => h.column > 0)")
    assert "without first and special tokens" in browser.text("#spots-scope")
    for order, said in (
        ("size", "No cell has a number other than zero."),
        ("z", "No cell stands out within its layer."),
    ):
        browser.open(f"{made.address}#pair=alpha&mask=1&first=99&order={order}")
        assert browser.execute_script("return [S.spots.length, byId('spots-none').hidden]") == [0, False]
        assert browser.text("#spots-none") == said


def test_an_imported_pass_with_a_hyphen_in_its_name_is_a_pass(tmp_path: Path, browser: Browser) -> None:
    names = {"SB": "my-pass", "SS": "x-y"}
    said = record(random.Random(1), 0, ["a", "b"])
    for run in said["runs"]:
        run["name"] = names.get(run["name"], run["name"])
    for both in said["pairwise"]:
        both |= {side: names.get(both[side], both[side]) for side in ("base_run", "sft_run")}
    import_json(str(write(tmp_path / "f.json", [said])), str(tmp_path / "out"), pair="p")
    con = open_run(str(tmp_path / "out"))
    page = write_page(con, tmp_path / "page.html").path
    for view, kind, metric in (("my-pass", "run", "norm"), ("x-y", "run", "entropy"), ("my-pass-x-y", "comparison", "norm_diff_relative"), ("BB-my-pass", "comparison", "entropy_delta")):  # fmt: skip
        browser.open(f"file://{page}#show={view}&metric={metric}&cell=0.1")
        assert browser.execute_script("return [S.view, viewKind(S.view), S.metric]") == [view, kind, metric]
        there = [value for _, _, value in con.execute(browser.execute_script("return SQL.grid(S)")).fetchall()]
        np.testing.assert_allclose(browser.execute_script("return [...S.values]"), there, rtol=2e-3)
        card = browser.wait("return document.querySelector('#cell .lists ol') && byId('cell').innerText")
        assert ("norm of my-pass" in card) is (kind == "comparison")
    assert browser.logs()[0] == []


def test_a_layer_of_equal_numbers_has_no_hotspot_by_z(tmp_path: Path, browser: Browser) -> None:
    taken = alpha()
    for name, column, value in (
        ("BB-SS", "norm_diff", 1.0),
        ("BB", "norm", 10.0),
    ):  # 0.1 each: the sum of three is not 0.3
        taken.cells[1, "identity", name][column][1] = value
    write_capture(tmp_path / "out", taken)
    page = write_page(open_run(str(tmp_path / "out")), tmp_path / "page.html").path
    browser.open(f"file://{page}#prompt=1&show=BB-SS&metric=norm_diff_relative&order=z")
    assert set(browser.execute_script("return S.spots.map((h) => h.row)")) == {0, 2, 3}


def test_the_noise_floor_is_that_of_each_layer_where_the_tables_have_only_some(
    tmp_path: Path,
    browser: Browser,
) -> None:
    path = write_capture(tmp_path / "out", keep_layers(alpha(), 0, 2)) / "capture.json"
    floors = {run: {"norm_diff": [0.0, 1.5, 9.0, 2.5 if run == "SS" else 0.5]} for run in PASSES}
    noise = {"measured": True, "by_run_and_layer": floors}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_floor": noise}))
    con = open_run(str(tmp_path / "out"))
    grid = build_residual_grid(con, "norm_diff", prompt=0)
    assert grid.floor is not None
    browser.open(f"file://{write_page(con, tmp_path / 'page.html').path}#show=BB-SS&metric=norm_diff")
    assert browser.execute_script("return S.floor") == grid.floor.tolist() == [1.5, 2.5]
    assert "Dots: below the noise floor." in browser.text("#grid-note")
    browser.open(f"file://{tmp_path / 'page.html'}#show=BB-SS&metric=kl_divergence")
    assert browser.execute_script("return S.floor") is None, "of this metric none is measured"


def test_a_text_that_turns_the_direction_does_not_turn_what_stands_beside_it(tmp_path: Path, browser: Browser) -> None:
    """A title said SS-BB of the grid of BB-SS."""
    turned = make_capture("p", "feed", PASSES, 1, {(0, "identity"): ["red\u202egnp", " שלום", " a\nb"]}, {1}, 1)
    write_capture(tmp_path / "out", replace(turned, tracked=((7, "Ġthe", "th\u202ee"), (9, "no", "no"))))
    page = write_page(open_run(str(tmp_path / "out")), tmp_path / "page.html").path
    browser.open(f"file://{page}#show=BB-SS&metric=logit+7")
    assert browser.text("#grid-title") == "logit of th\\x202ee, BB-SS"
    assert browser.text("#text") == "red\\x202egnp שלום a\nb", "right-to-left script is left as it is"
    assert browser.text("#prompt option") == "0: red\\x202egnp שלום a b"
    assert "\u202e" not in browser.execute_script("return document.body.innerText")
