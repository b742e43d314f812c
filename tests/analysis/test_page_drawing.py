"""How the page is drawn: markup is text, colours are what they say, nothing is wider than the window."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, choose, point
from pages import EVIL, TOKENS, Made
from synthetic import PASSES, alpha, beta, make_capture, write_capture

from analysis import open_run
from analysis.html_page import write_page


def test_numbers_stand_behind_a_token_that_is_written_from_right_to_left(tmp_path: Path, browser: Browser) -> None:
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


def test_markup_in_prompts_and_tokens_is_text(made: Made, browser: Browser) -> None:
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


def test_even_a_script_of_its_own_could_reach_no_host(made: Made, browser: Browser) -> None:
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


def test_colours_are_locked_logarithmic_and_diverging_as_asked(made: Made, browser: Browser) -> None:
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
def test_nothing_is_wider_than_the_window(made: Made, browser: Browser, width: int, theme: str) -> None:
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


def test_the_spectrum_shows_where_there_is_one(made: Made, browser: Browser) -> None:
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


@pytest.mark.parametrize("log", ["", "&log=1"])
def test_a_chart_of_numbers_that_are_equal_but_for_rounding_is_drawn(
    tmp_path: Path,
    browser: Browser,
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


def test_the_noise_floor_is_drawn_with_numbers_in_the_cells_and_without(tmp_path: Path, browser: Browser) -> None:
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
