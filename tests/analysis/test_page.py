"""The page in a headless Chromium: what it shows is what SQL says, and pickers, pointer, keys and links work."""

from __future__ import annotations

import json
import random
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser  # noqa: F401  (a fixture)
from seed_files import record, write
from synthetic import PASSES, alpha, beta, keep_layers, make_capture, write_capture

from analysis import build_residual_grid, open_run
from analysis.html_page import write_page
from analysis.json_import import import_json

EVIL = "</script><script>window.hacked = 1</script>"
TOKENS = ["<s>", EVIL, ' "it\'s"', "<!--", "<img src=x onerror=window.hacked=1>", "\n", " &amp;", " end"]


@dataclass(frozen=True)
class Made:
    address: str
    con: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Made:  # noqa: F811
    out = tmp_path_factory.mktemp("page") / "out"
    write_capture(out, alpha())
    write_capture(out, beta())
    tokens = {(0, "identity"): TOKENS, (1, "identity"): [f" w{i}" for i in range(120)]}
    path = write_capture(out, make_capture("it's", "feedfeedfeedfeed", PASSES, 3, tokens, {-1, 0, 1, 2, 3}, 5))
    said = json.loads((path / "capture.json").read_text())
    (path / "capture.json").write_text(json.dumps(said | {"lens": {"norm": "final", "layers": [-1, 0, 1, 2, 3]}}))
    con = open_run(str(out))
    done = write_page(con, out.parent / "page.html")
    return Made(f"file://{done.path}", con)


def press(browser: Browser, keys: str) -> None:  # noqa: F811
    """Type keys into the page, one after the other, each when the one before is drawn."""
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(browser.driver).send_keys(key).perform()
        browser.wait_ready()


def point(browser: Browser, row: int, column: int, *, click: bool = False) -> None:  # noqa: F811
    from selenium.webdriver.common.action_chains import ActionChains

    x, y = browser.execute_script(
        "grid.canvas.scrollIntoView({block: 'center'}); const b = grid.canvas.getBoundingClientRect();"
        "return [grid.gutter + (arguments[1] + 0.5) * grid.cellWidth - grid.scroller.scrollLeft - b.width / 2,"
        "(S.data.rows - 1 - arguments[0] + 0.5) * grid.cellHeight - b.height / 2]", row, column)  # fmt: skip
    chain = ActionChains(browser.driver).move_to_element_with_offset(browser.find("#grid"), round(x), round(y))
    (chain.click() if click else chain).perform()
    browser.wait_ready()


def choose(browser: Browser, picker: str, text: str | int) -> None:  # noqa: F811
    from selenium.webdriver.support.ui import Select

    found = Select(browser.find(f"#{picker}"))
    found.select_by_index(text) if isinstance(text, int) else found.select_by_visible_text(text)
    browser.wait_ready()


def test_it_opens_without_a_complaint_and_asks_for_nothing_but_itself(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(made.address)
    console, asked = browser.logs()
    assert console == []
    assert asked == [made.address]
    assert browser.text("#grid-title") == "kl_divergence, BB-SS"
    assert browser.execute_script("return S.pair.name") == "alpha"


def test_every_number_of_every_grid_is_what_its_sql_says(made: Made, browser: Browser) -> None:  # noqa: F811
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


def test_of_two_layers_of_which_the_lens_says_the_same_one_is_a_hotspot(made: Made, browser: Browser) -> None:  # noqa: F811
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
    browser: Browser,  # noqa: F811
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


def test_pickers_choose_pair_prompt_comparison_and_metric(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(made.address)
    choose(browser, "pair", "it's")
    choose(browser, "prompt", 1)
    choose(browser, "view", "SB-SS")
    choose(browser, "metric", "norm_diff")
    assert browser.text("#grid-title") == "norm_diff, SB-SS"
    assert browser.execute_script("return [S.pair.name, S.sheet.prompt, S.data.columns]") == ["it's", 1, 120]
    choose(browser, "view", "interaction of embeddings and blocks")
    assert browser.text("#grid-title") == "norm, interaction of embeddings and blocks", "a metric that passes have"
    choose(browser, "pair", "beta")
    assert browser.execute_script("return [S.view, S.pair.name, byId('four').hidden]") == ["BB-SS", "beta", True]
    choose(browser, "prompt", 1)
    assert browser.execute_script("return S.sheet.variant") == "mirror_halves"


def test_the_pointer_reads_a_cell_with_all_metrics_and_both_lists(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    point(browser, 2, 3)
    card = browser.wait("return document.querySelector('#cell .lists ol') && byId('cell').innerText")
    assert "layer 1" in card
    assert "·long-token" in card
    for metric in (
        "cosine_distance",
        "norm_diff",
        "kl_divergence",
        "kl_reverse",
        "top1_agree",
        "entropy_delta",
        "logit of agrees",
        "norm of BB",
    ):
        assert metric in card
    rows = made.con.execute(browser.text("#cell-sql pre")).fetchall()
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#cell .lists > div')].map((d) => [d.querySelector('h4').textContent,"
        "[...d.querySelectorAll('li')].map((li) => [li.children[0].title, li.children[0].textContent, li.children[1].textContent])])"
    )
    rows += made.con.execute(
        "SELECT run, rank, token_id, token, logit FROM topk WHERE pair = 'alpha' AND prompt_idx = 0 AND layer = 1 "
        "AND position = 3 ORDER BY run, rank"
    ).fetchall()
    titles = {"rose, BB to SS": "increased", "fell, BB to SS": "decreased", "BB predicts": "BB", "SS predicts": "SS"}
    assert [title for title, _ in shown] == list(titles)
    for heading, items in shown:
        mine = [row for row in rows if row[0] == titles[heading]]
        assert len(mine) == 3
        assert [title for title, _, _ in items] == [f"token {row[2]}" for row in mine]
        for (_, text, value), row in zip(items, mine, strict=True):
            assert float(value.replace("−", "-")) == pytest.approx(row[4], rel=5e-3)
            stored = made.con.execute(
                "SELECT token FROM tokens WHERE pair = 'alpha' AND token_id = ?", [row[2]]
            ).fetchone()
            assert text == (stored[0].replace(" ", "·").replace("\n", "⏎") if stored else f"#{row[2]}")
    tip = browser.find("#tip")
    assert tip.is_displayed()
    assert "long-token" in tip.text
    assert browser.find("#marginals").is_displayed() is False, "only a click asks for the marginals"


def test_of_tokens_with_one_text_the_next_of_the_prompt_alone_is_marked(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    point(browser, 2, 3)
    one, other = browser.wait(
        "const ids = [...document.querySelectorAll('#cell .lists .token')].map((t) => Number(t.title.split(' ')[1]));"
        "return ids.length && [...new Set(ids)].slice(0, 2)"
    )
    script = """
      const [next, ...ids] = arguments;
      for (const id of ids) S.pair.texts[id] = S.data.sheet.tokens[4] = "\ufffd";
      S.data.sheet.ids[4] = next;
      return drawCell(S).then(() => [...new Set([...document.querySelectorAll("#cell .next .token")].map((t) => t.title))]);
    """
    assert browser.execute_script(script, one, one, other) == [f"token {one}"]
    unknown = browser.execute_script(script, -1, one, other)
    assert set(unknown) == {f"token {one}", f"token {other}"}, "an imported file says no ids"


def test_another_prompt_or_metric_under_the_pointer_is_not_read_as_the_one_before(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    point(browser, 1, 4)
    assert "界" in browser.text("#tip")
    press(browser, "p")
    assert browser.execute_script("return [S.sheet.tokens.length, byId('tip').hidden]") == [3, True], (
        "there is no token 4"
    )
    assert "界" not in browser.text("#cell")
    press(browser, "P")
    point(browser, 1, 4)
    press(browser, "m")
    assert not browser.find("#tip").is_displayed(), "it said what the metric before was"
    assert browser.text("#cell .where").startswith("界"), "the cell last seen, with the new metric"
    assert browser.logs()[0] == []


def test_a_pass_may_have_the_name_of_an_effect(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    write_capture(
        tmp_path / "out", make_capture("p", "feed", ("BB", "blocks"), 1, {(0, "identity"): ["a", "b"]}, {1}, 1)
    )
    con = open_run(str(tmp_path / "out"))
    browser.open(f"file://{write_page(con, tmp_path / 'page.html').path}#show=blocks&metric=norm")
    rows = con.execute(browser.text("#grid-sql pre")).fetchall()
    assert browser.text("#grid-title") == "norm, blocks"
    assert browser.execute_script("return Array.from(S.values)") == pytest.approx([value for *_, value in rows])
    assert browser.logs()[0] == []


def test_numbers_stand_behind_a_token_that_is_written_from_right_to_left(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    tokens = {(0, "identity"): ["a", "\u05e9\u05dc\u05d5\u05dd", "b"]}
    write_capture(tmp_path / "out", make_capture("p", "feed", PASSES, 1, tokens, {1}, 1))
    page = write_page(open_run(str(tmp_path / "out")), tmp_path / "page.html").path
    browser.open(f"file://{page}#show=BB-SS&metric=norm_diff&cell=1.1")
    left_to_right = browser.execute_script("""
      const chart = byId("by-token").querySelector("svg"), box = chart.getBoundingClientRect(), seen = [];
      chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 52 + (box.width - 70) / 2 }));
      const walk = document.createTreeWalker(byId("by-token").querySelector(".readout"), NodeFilter.SHOW_TEXT);
      while (walk.nextNode())
        for (let i = 0; i < walk.currentNode.length; i++) {
          const range = document.createRange();
          range.setStart(walk.currentNode, i);
          range.setEnd(walk.currentNode, i + 1);
          seen.push([range.getBoundingClientRect().left, walk.currentNode.data[i]]);
        }
      return seen.sort((a, b) => a[0] - b[0]).map(([, letter]) => letter).join("");""")
    assert left_to_right == f"1 \u05dd\u05d5\u05dc\u05e9: {browser.execute_script('return show(S.values[7], 3)')}"


def test_a_click_keeps_the_cell_and_shows_its_row_and_column(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    point(browser, 1, 4, click=True)
    assert browser.text("#by-token-title") == "Layer 0, over tokens"
    assert browser.text("#by-layer-title") == "Token 界 (4), over layers"
    assert browser.execute_script(
        "return ['by-token', 'by-layer'].map((id) => byId(id).querySelectorAll('.dot').length)"
    ) == [5, 4]
    browser.execute_script("document.querySelectorAll('#spots button')[3].click()")
    browser.wait("return jump.last === 3 && S.cell.row === S.spots[3].row && S.cell.column === S.spots[3].column")


def test_keys_move_and_switch(made: Made, browser: Browser) -> None:  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    browser.open(f"{made.address}#pair=alpha&show=BB-BS")
    state = lambda: browser.execute_script(  # noqa: E731
        "return [S.sheet.prompt, S.view, S.metric, S.log, S.lock, S.mask, S.order, S.scope, S.zoom, S.cell && [S.cell.row, S.cell.column]]"
    )
    press(browser, "pcmlsxza+")
    assert state() == [1, "BB-SB", "kl_reverse", True, True, True, "z", "all", 1, None]
    press(browser, "PCMlsxza-")
    assert state() == [0, "BB-BS", "kl_divergence", False, False, False, "size", "prompt", 0, None]
    press(browser, Keys.ARROW_UP + Keys.ARROW_RIGHT + Keys.ARROW_UP + Keys.ARROW_RIGHT + Keys.ARROW_LEFT)
    assert state()[-1] == [1, 1]
    press(browser, Keys.ESCAPE)
    assert state()[-1] is None
    press(browser, "hh")
    assert browser.execute_script("return S.cell.row === S.spots[1].row && S.cell.column === S.spots[1].column")
    before = browser.execute_script("return dark()")
    press(browser, "t")
    assert browser.execute_script("return [dark(), getComputedStyle(document.body).colorScheme]") == [
        not before,
        "light" if before else "dark",
    ]
    press(browser, "?")
    assert browser.find("#keys").is_displayed()


def test_a_link_brings_the_view_back(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(made.address)
    choose(browser, "pair", "it's")
    browser.execute_script("document.activeElement.blur()")  # in a picker, keys are the picker's
    press(browser, "cmlsxzat")
    point(browser, 2, 5, click=True)
    link, title = browser.current_url, browser.execute_script("return document.title")
    browser.open(link)
    assert browser.execute_script("return [toHash(), document.title]") == [link[link.index("#") :], title]
    assert browser.execute_script("return [S.cell.row, S.cell.column, S.log, S.lock, S.mask, S.order, S.scope]") == [2, 5, True, True, True, "z", "all"]  # fmt: skip
    browser.execute_script("location.hash = '#pair=alpha&prompt=1'")
    browser.wait("return S.pair.name === 'alpha' && S.sheet.prompt === 1")
    browser.open(f"{made.address}#pair=nobody&prompt=99&show=XX&metric=none&cell=77.x&zoom=q&theme=%3Cb%3E")
    assert browser.execute_script("return [S.pair.name, S.sheet.prompt, S.view, S.metric, S.cell]") == [
        "alpha",
        0,
        "BB-SS",
        "kl_divergence",
        None,
    ]
    assert browser.logs()[0] == []


def test_markup_in_prompts_and_tokens_is_text(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=it%27s&prompt=0&cell=0.1")
    point(browser, 1, 1)
    assert browser.text("#text") == "".join(TOKENS)
    seen = EVIL.replace(" ", "·")
    assert seen in browser.wait("return byId('cell').textContent")
    assert browser.execute_script("return [window.hacked, document.images.length]") == [None, 0]
    assert seen in browser.text("#tip")
    console, asked = browser.logs()
    assert console == []
    assert all(address.startswith("file:") for address in asked)


def test_even_a_script_of_its_own_could_reach_no_host(made: Made, browser: Browser) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1.5)
        called = threading.Event()

        def listen() -> None:
            try:
                server.accept()
                called.set()
            except TimeoutError:
                pass

        listener = threading.Thread(target=listen)
        listener.start()
        browser.open(made.address)
        refused = browser.driver.execute_async_script(
            """const address = `http://127.0.0.1:${arguments[0]}/`, done = arguments[1];
            const image = new Image(); image.src = address; document.body.append(image);
            const frame = document.createElement("iframe"); frame.src = address; document.body.append(frame);
            const code = document.createElement("script"); code.textContent = "window.hacked = 1"; document.body.append(code);
            fetch(address).then(() => done(false), () => done(true));""", server.getsockname()[1])  # fmt: skip
        listener.join()
        assert refused
        assert not called.is_set()
        assert browser.execute_script("return window.hacked") is None, (
            "a script that is not the page's own does not run"
        )
        browser.logs()


def test_colours_are_locked_logarithmic_and_diverging_as_asked(made: Made, browser: Browser) -> None:  # noqa: F811
    ends = "return [S.scale.low, S.scale.high, S.scale.signed, S.scale.log]"
    seen = {}
    for lock in ("", "&lock=1"):
        for view in ("BB-SS", "SB-SS"):
            browser.open(f"{made.address}#pair=alpha&metric=norm_diff&show={view}{lock}")
            seen[lock, view] = browser.execute_script(ends)
    assert seen["", "BB-SS"][:2] != seen["", "SB-SS"][:2]
    assert seen["&lock=1", "BB-SS"] == seen["&lock=1", "SB-SS"]
    browser.open(f"{made.address}#pair=alpha&metric=entropy_delta&log=1")
    low, high, signed, log = browser.execute_script(ends)
    assert (low, signed, log) == (-high, True, True)
    middle = browser.execute_script("return [S.scale.step(0), S.scale.step(S.scale.high), S.scale.step(S.scale.low)]")
    assert middle == [128, 255, 0]
    drawn = "const p = grid.pen.getImageData(grid.gutter + 4, 4, 1, 1).data; return [p[0], p[1], p[2]]"
    theme = {}
    for name in ("light", "dark"):
        browser.open(f"{made.address}#pair=alpha&theme={name}&zoom=-4")
        expected = browser.execute_script(
            "return S.scale.css[S.scale.step(S.values[(S.data.rows - 1) * S.data.columns])]"
        )
        theme[name] = browser.execute_script(drawn)
        assert expected == f"rgb({','.join(map(str, theme[name]))})", "the canvas has the colour of the scale"
    assert theme["light"] != theme["dark"]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(made: Made, browser: Browser, width: int, theme: str) -> None:  # noqa: F811
    browser.width(width)
    try:
        for link in ("pair=alpha&cell=1.2", "pair=it%27s&prompt=1&cell=1.100&show=embeddings"):
            browser.open(f"{made.address}#{link}&theme={theme}")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            outside = browser.execute_script(
                "return [...document.querySelectorAll('.panel *')].filter((e) => !e.closest('#scroller, pre, svg, [hidden]') && e.offsetParent && "
                "e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"
            )
            assert outside == []
    finally:
        browser.width(1280)


def test_the_spectrum_shows_where_there_is_one(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS&cell=1.0")
    panel = browser.find("#spectrum-panel")
    assert panel.is_displayed()
    layers, ranks, _, _, values = zip(*made.con.execute(browser.text("#spectrum-sql pre")).fetchall(), strict=True)
    shown = browser.driver.execute_async_script("""const done = arguments[0], { spectrum } = S.pair;
      open_(spectrum.block, spectrum.arrays).then((get) => done([spectrum.layers, [...get("identity BB-SS effective_rank", spectrum.layers.length)]]));""")
    assert shown[0] == list(layers)
    np.testing.assert_allclose(shown[1], [np.nan if r is None else r for r in ranks], rtol=1e-6)
    assert browser.text("#spectrum-layer") == "Largest singular values, layer 1"
    assert browser.execute_script("return [...document.querySelectorAll('#spectrum-values .dot')].length") == len(
        values[layers.index(1)]
    )
    choose(browser, "view", "BB")
    assert not browser.find("#spectrum-panel").is_displayed()


def hold(browser: Browser, block: str) -> None:  # noqa: F811
    """From here on a block is not read before the page is told: held.go()."""
    browser.execute_script(
        """const real = open_, late = arguments[0];
        window.held = {};
        open_ = (block, places) => block !== late ? real(block, places)
          : new Promise((done) => { held.go = () => done(real(block, places)); });""",
        block,
    )


def settle(browser: Browser) -> None:  # noqa: F811
    """Let the page do all that it can do now."""
    browser.driver.execute_async_script("setTimeout(arguments[0], 100)")


def test_a_spectrum_that_is_read_late_is_not_drawn_over_that_of_the_pair_chosen_since(
    made: Made,
    browser: Browser,  # noqa: F811
) -> None:
    browser.open(f"{made.address}#pair=beta&show=BB-SS")
    hold(browser, "s0")
    choose(browser, "pair", "alpha")
    browser.wait("return !!held.go")
    choose(browser, "pair", "it's")
    shown = "return [byId('spectrum-layer').textContent, byId('spectrum-values').innerHTML]"
    own = browser.execute_script(shown)
    browser.execute_script("held.go()")
    settle(browser)
    assert browser.execute_script(shown) == own, "that of alpha came last"


def test_a_cell_that_was_let_go_does_not_come_back_with_its_lists(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    hold(browser, "l0-0")
    browser.execute_script("S.select({ row: 1, column: 1 })")
    browser.wait("return !!held.go")
    press(browser, "\ue00c")  # Esc
    browser.execute_script("held.go()")
    settle(browser)
    assert browser.text("#cell").startswith("Point at a cell")
    assert browser.text("#cell-sql pre") == ""


def test_a_hotspot_of_the_pair_before_does_not_bring_its_numbers_under_the_name_of_the_next(
    made: Made,
    browser: Browser,  # noqa: F811
) -> None:
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    hold(browser, "b2-0")
    browser.execute_script("takePair(INDEX.pairs[2])")
    browser.wait("return !!held.go")
    browser.find("#spots button").click()  # the list is still that of alpha
    settle(browser)
    browser.execute_script("held.go()")
    browser.wait_ready()
    shown = "return [S.pair.name, S.pair.sheets.includes(S.sheet), S.data.sheet === S.sheet, S.data.rows]"
    assert browser.execute_script(shown) == ["it's", True, True, 5]


def test_a_key_while_the_next_pair_is_read_chooses_no_cell_that_it_does_not_have(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=it%27s&show=BB-SS")
    hold(browser, "b1-0")
    browser.execute_script("takePair(INDEX.pairs[1])")
    browser.wait("return !!held.go")
    browser.execute_script("for (let i = 0; i < 5; i++) KEYS.ArrowRight()")  # beta has two tokens
    browser.execute_script("held.go()")
    browser.wait_ready()
    assert browser.execute_script("return [S.pair.name, S.cell, S.spots[0].data.pair.name]") == ["beta", None, "beta"]
    assert browser.logs()[0] == []


@pytest.mark.parametrize("log", ["", "&log=1"])
def test_a_chart_of_numbers_that_are_equal_but_for_rounding_is_drawn(
    tmp_path: Path,
    browser: Browser,  # noqa: F811
    log: str,
) -> None:
    taken = (
        beta()
    )  # the lens reads one layer, and its two tokens say the same: a tenth of the way between is not quite it
    taken.cells[0, "identity", "BB"]["entropy"][2] = 0.1
    taken.cells[0, "identity", "BB"]["norm_delta"][1:] = -0.1
    write_capture(tmp_path / "out", taken)
    page = write_page(open_run(str(tmp_path / "out")), tmp_path / "page.html").path
    for metric in ("entropy", "norm_delta"):
        browser.open(f"file://{page}#show=BB&metric={metric}{log}")
        between = browser.execute_script(
            "const p = profile([S.data], S.view, S.metric, null); return p.p10[2] - p.p50[2]"
        )
        assert 0 < abs(between) < 1e-15
        assert (
            1 < browser.execute_script("return document.querySelectorAll('#profile .rule, #profile .zero').length") < 20
        )


def test_cells_without_a_number_and_the_masks_are_told(made: Made, browser: Browser) -> None:  # noqa: F811
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


def test_a_cell_of_an_infinite_norm_is_read_like_any_other(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    made = alpha()
    made.cells[0, "identity", "BB"]["norm"][1, 1] = np.inf
    write_capture(tmp_path / "out", made)
    page = write_page(open_run(str(tmp_path / "out")), tmp_path / "page.html").path
    for view, metric, said in (
        ("BB", "norm", "norm∞residual"),
        ("BB-SS", "norm_delta", "norm_delta∞residual"),
        ("embeddings", "norm", "norm−∞residual"),
    ):
        browser.open(f"file://{page}#show={view}&metric={metric}&cell=0.1")
        assert said in browser.text("#cell").replace(" ", "")
        point(browser, 1, 1)
        assert browser.text("#tip").endswith(said.removeprefix(metric).removesuffix("residual"))
    assert browser.logs()[0] == []


def test_an_imported_pass_with_a_hyphen_in_its_name_is_a_pass(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
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


def test_a_layer_of_equal_numbers_has_no_hotspot_by_z(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
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


def test_the_number_of_first_tokens_to_leave_out_is_chosen(made: Made, browser: Browser) -> None:  # noqa: F811
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    state = (
        "return [S.mask, S.first, [...S.left].sort(), Math.min(...S.spots.map((h) => h.column)), byId('first').value]"
    )
    assert browser.execute_script(state) == [False, 1, [], 0, "1"]
    for typed, (first, left, lowest, words) in {
        "3": (3, [0, 1, 2], 3, "without first 3 and special tokens"),
        "0": (0, [0], 1, "without special tokens"),  # token 0 is special
        "-2": (1, [0], 1, "without first and special tokens"),
    }.items():
        browser.execute_script(
            "const f = byId('first'); f.value = arguments[0]; f.dispatchEvent(new Event('change'))", typed
        )
        browser.wait_ready()
        assert browser.execute_script(state) == [True, first, left, lowest, str(first)]
        assert browser.text("#spots-scope").endswith(words)
    browser.open(f"{made.address}#pair=alpha&show=BB-SS&mask=1&first=4")
    assert browser.execute_script("return [S.first, [...S.left], toHash().includes('first=4')]") == [
        4,
        [0, 1, 2, 3],
        True,
    ]
    browser.open(f"{made.address}#pair=alpha&mask=1&first=400")
    assert browser.execute_script("return S.spots.length") == 0, "every token is left out"
    assert browser.text("#grid-note").startswith("Every token that has a number is left out.")
    browser.open(f"{made.address}#pair=alpha&mask=1&first=x")
    assert browser.execute_script("return S.first") == 1
    assert browser.logs()[0] == []


def test_the_noise_floor_is_that_of_each_layer_where_the_tables_have_only_some(
    tmp_path: Path,
    browser: Browser,  # noqa: F811
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


def test_the_noise_floor_is_drawn_with_numbers_in_the_cells_and_without(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    taken = alpha()
    path = write_capture(tmp_path / "out", taken) / "capture.json"
    floors = {run: {"norm_diff": [0.0, 1.5, 1.5, 2.5]} for run in PASSES}
    noise = {"measured": True, "by_run_and_layer": floors}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_floor": noise}))
    con = open_run(str(tmp_path / "out"))
    below = con.execute(
        "SELECT layer + 1, position FROM pairwise_floor WHERE prompt_idx = 0 AND comparison = 'BB-SS' AND below_floor "
        "ORDER BY ALL"
    ).fetchall()
    assert 0 < len(below) < 4 * 5
    page = write_page(con, tmp_path / "page.html").path
    for theme in ("light", "dark"):
        for zoom, numbers in ((0, True), (-4, False)):
            browser.open(f"file://{page}#pair=alpha&show=BB-SS&metric=norm_diff&zoom={zoom}&theme={theme}")
            assert browser.execute_script("return grid.cellWidth >= 46") is numbers
            assert "Dots: below the noise floor." in browser.text("#grid-note")
            dotted = browser.execute_script("""
              const pixels = () => {
                drawGrid(S);
                const found = [];
                for (let row = 0; row < S.data.rows; row++) for (let column = 0; column < S.data.columns; column++)
                  found.push([row, column, grid.pen.getImageData(grid.gutter + column * grid.cellWidth,
                    (S.data.rows - 1 - row) * grid.cellHeight, grid.cellWidth, grid.cellHeight).data.join()]);
                return found;
              };
              const there = pixels();
              S.floor = null;
              const without = pixels();
              return there.filter((cell, i) => cell[2] !== without[i][2]).map(([row, column]) => [row, column]);""")
            assert dotted == [list(cell) for cell in below], (theme, zoom)
