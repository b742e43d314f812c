"""Reading the page: pickers, pointer, clicks, keys and links, and what is read from the file later than it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from browser import Browser, choose, point, press
from pages import Made
from synthetic import alpha, write_capture

from analysis import open_run
from analysis.html_page import write_page


def test_pickers_choose_pair_prompt_comparison_and_metric(made: Made, browser: Browser) -> None:
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


def test_the_pointer_reads_a_cell_with_all_metrics_and_both_lists(made: Made, browser: Browser) -> None:
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


def test_of_tokens_with_one_text_the_next_of_the_prompt_alone_is_marked(made: Made, browser: Browser) -> None:
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


def test_another_prompt_or_metric_under_the_pointer_is_not_read_as_the_one_before(made: Made, browser: Browser) -> None:
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


def test_a_click_keeps_the_cell_and_shows_its_row_and_column(made: Made, browser: Browser) -> None:
    browser.open(f"{made.address}#pair=alpha&show=BB-SS")
    point(browser, 1, 4, click=True)
    assert browser.text("#by-token-title") == "Layer 0, over tokens"
    assert browser.text("#by-layer-title") == "Token 界 (4), over layers"
    assert browser.execute_script(
        "return ['by-token', 'by-layer'].map((id) => byId(id).querySelectorAll('.dot').length)"
    ) == [5, 4]
    browser.execute_script("document.querySelectorAll('#spots button')[3].click()")
    browser.wait("return jump.last === 3 && S.cell.row === S.spots[3].row && S.cell.column === S.spots[3].column")


def test_keys_move_and_switch(made: Made, browser: Browser) -> None:
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


def test_a_link_brings_the_view_back(made: Made, browser: Browser) -> None:
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


def hold(browser: Browser, block: str) -> None:
    """From here on a block is not read before the page is told: held.go()."""
    browser.execute_script(
        """const real = open_, late = arguments[0];
        window.held = {};
        open_ = (block, places) => block !== late ? real(block, places)
          : new Promise((done) => { held.go = () => done(real(block, places)); });""",
        block,
    )


def settle(browser: Browser) -> None:
    """Let the page do all that it can do now."""
    browser.driver.execute_async_script("setTimeout(arguments[0], 100)")


def test_a_spectrum_that_is_read_late_is_not_drawn_over_that_of_the_pair_chosen_since(
    made: Made,
    browser: Browser,
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


def test_a_cell_that_was_let_go_does_not_come_back_with_its_lists(made: Made, browser: Browser) -> None:
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
    browser: Browser,
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


def test_a_key_while_the_next_pair_is_read_chooses_no_cell_that_it_does_not_have(made: Made, browser: Browser) -> None:
    browser.open(f"{made.address}#pair=it%27s&show=BB-SS")
    hold(browser, "b1-0")
    browser.execute_script("takePair(INDEX.pairs[1])")
    browser.wait("return !!held.go")
    browser.execute_script("for (let i = 0; i < 5; i++) KEYS.ArrowRight()")  # beta has two tokens
    browser.execute_script("held.go()")
    browser.wait_ready()
    assert browser.execute_script("return [S.pair.name, S.cell, S.spots[0].data.pair.name]") == ["beta", None, "beta"]
    assert browser.logs()[0] == []


def test_a_cell_of_an_infinite_norm_is_read_like_any_other(tmp_path: Path, browser: Browser) -> None:
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


def test_the_number_of_first_tokens_to_leave_out_is_chosen(made: Made, browser: Browser) -> None:
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
