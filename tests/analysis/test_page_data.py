"""What goes into the page: the numbers' precision, what fits, which prompts, whose tokens; and every wrong call."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import alpha, beta, make_capture, write_capture

from analysis import QueryError, open_run
from analysis.html_data import choose_pairs, parse_prompts, read_lists, read_sheet
from analysis.html_pack import Packer, to_half
from analysis.html_page import PAGE, SCRIPTS, write_page
from capture.errors import StoreError


def index_of(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="index">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_half_precision_keeps_three_digits_over_eight_decades_and_no_number_overflows() -> None:
    rng = np.random.default_rng(0)
    values = (10.0 ** rng.uniform(-7, 1, 5000)).astype(np.float32)
    halves, scale = to_half(values)
    np.testing.assert_allclose(halves.astype(np.float64) * scale, values, rtol=5e-4)
    assert np.log2(scale) == int(np.log2(scale)), "a power of two loses nothing"
    halves, scale = to_half(np.array([1e30, -3e29, 0, np.nan, np.inf], np.float32))
    back = halves.astype(np.float64) * scale
    np.testing.assert_allclose(back[:3], [1e30, -3e29, 0], rtol=5e-4)
    assert np.isnan(back[3:]).all()
    assert to_half(np.zeros(3, np.float32))[1] == 1.0


def test_numbers_that_half_precision_would_take_the_digits_of_are_packed_whole() -> None:
    packer = Packer()
    small = np.array([7.0, 2.0**-26, 0, np.nan, np.inf], np.float32)
    packer.half("fits", small)
    packer.half("spans", np.array([7.0, 3e-11, 0, np.nan, -np.inf], np.float32))
    packer.half("agrees", np.array([True, False]))
    assert {name: place[0] for name, place in packer.places.items()} == {"fits": "f2", "spans": "f4", "agrees": "f2"}
    raw = gzip.decompress(base64.b64decode(packer.block()))
    at = packer.places["spans"][1]
    values = np.frombuffer(raw[at : at + 20], np.uint8).reshape(4, 5).T.copy().view("<f4")[:, 0]
    np.testing.assert_array_equal(values, np.array([7.0, 3e-11, 0, np.nan, np.nan], np.float32))


def test_equal_arrays_are_packed_once() -> None:
    packer = Packer()
    values = np.arange(100, dtype=np.float32)
    packer.exact("SB norm", values)
    packer.exact("BB norm", values.copy())
    packer.half("BB-SB norm_diff", np.zeros(100, np.float32))
    assert packer.places == {"SB norm": ["f4", 0, 1.0], "BB norm": ["f4", 0, 1.0], "BB-SB norm_diff": ["f2", 400, 1.0]}
    raw = gzip.decompress(base64.b64decode(packer.block()))
    assert len(raw) == 600
    planes = np.frombuffer(raw[:400], np.uint8).reshape(4, 100).T.copy()
    np.testing.assert_array_equal(planes.view("<f4")[:, 0], values)


def test_the_page_needs_no_host_and_allows_only_its_own_code(con: Any, tmp_path: Path) -> None:
    done = write_page(con, tmp_path / "page.html")
    text = done.path.read_text(encoding="utf-8")
    assert done.bytes == len(text.encode())
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"], "a namespace, not an address"
    assert "default-src 'none'" in text
    assert "unsafe" not in text[: text.index("<style>")]
    assert set(SCRIPTS) | {"page.html", "page.css"} == {p.name for p in PAGE.iterdir()}, "every part is used"


def test_all_prompts_fit_by_default_and_fewer_into_less(con: Any, tmp_path: Path) -> None:
    done = write_page(con, tmp_path / "all.html")
    assert (done.pairs, done.prompts, done.total, done.lists) == (2, 4, 4, 4)
    bare = write_page(con, tmp_path / "bare.html", top_k=0)
    assert bare.lists == 0
    assert bare.bytes < done.bytes
    # the grids of all go first, and lists with what is left
    some = write_page(con, tmp_path / "some.html", max_mb=(bare.bytes + 3 * done.bytes) / 4e6)
    assert some.prompts == 4
    assert 0 < some.lists < 4
    with_lists = [["list_block" in sheet for sheet in pair["sheets"]] for pair in index_of(some.path)["pairs"]]
    assert with_lists[0][0], "the first prompt of the first pair comes first"
    less = write_page(con, tmp_path / "less.html", max_mb=bare.bytes / 1e6 - 0.001)
    assert less.bytes <= bare.bytes
    assert 2 <= less.prompts < 4
    with pytest.raises(
        QueryError, match=r"prompt 0 of pair 'alpha' takes .* raise it, or choose with --entries and --prompts"
    ):
        write_page(con, tmp_path / "none.html", max_mb=0.001)
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize("token", ["<<<<1", "\u2028\u2028", "界界", "a"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_no_page_is_larger_than_asked_whatever_its_tokens(tmp_path: Path, token: str, top_k: int) -> None:
    tokens = {(prompt, "identity"): [f"{token}{prompt}-{i}" for i in range(60)] for prompt in range(4)}
    write_capture(tmp_path / "out", make_capture("p", "c", ("BB", "SS"), 1, tokens, {1}, 0))
    con = open_run(str(tmp_path / "out"))
    whole = write_page(con, tmp_path / "all.html", top_k=top_k)
    sizes = [write_page(con, tmp_path / "page.html", top_k=top_k, max_mb=(whole.bytes - less) / 1e6) for less in range(1, 6000, 2500)]  # fmt: skip
    assert all(done.bytes <= whole.bytes - less for done, less in zip(sizes, range(1, 6000, 2500), strict=True))
    # a little is allowed for around each of its eight blocks
    room = write_page(con, tmp_path / "page.html", top_k=top_k, max_mb=(whole.bytes + 8 * 150) / 1e6)
    assert (room.prompts, room.lists) == (4, 4 if top_k else 0)


def test_lists_are_as_long_as_the_longest_there_is(con: Any, tmp_path: Path) -> None:
    done = [write_page(con, tmp_path / f"{k}.html", top_k=k) for k in (3, 200)]
    assert done[0].lists == done[1].lists == 4
    same = [re.sub('"made":"[^"]*"', "", d.path.read_text()) for d in done]
    assert same[0] == same[1]


def test_where_a_state_overflowed_the_lists_are_empty(tmp_path: Path) -> None:
    made = make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, {-1, 0, 1}, 0)
    made.cells[0, "identity", "BB-SS"]["increased"][1, 0] = np.nan
    made.cells[0, "identity", "BB-SS"]["increased_ids"][1, 0] = 777
    write_capture(tmp_path, made)
    with open_run(str(tmp_path)) as con:
        (pair,) = choose_pairs(con)
        sheet = read_sheet(pair, pair.prompts[0])
        read_lists(pair, sheet, 3)
    assert 777 not in sheet.ids
    assert len(sheet.ids) > 3


def test_an_id_of_several_texts_has_the_vocabularys(con: Any) -> None:
    (pair,) = choose_pairs(con, ("beta",))
    spelled = con.execute("SELECT token_id, token FROM vocabulary WHERE pair = 'beta'").fetchall()
    several = con.execute("SELECT count(DISTINCT token) FROM tokens WHERE pair = 'beta' GROUP BY token_id").fetchall()
    assert (2,) in several, "two variants of a made-up prompt have their own texts"
    assert pair.stored == dict(spelled)


def test_a_pair_is_read_from_its_own_files_alone(tmp_path: Path) -> None:
    """Where every pair was looked for among the files of all, three hundred pairs took four minutes."""
    write_capture(tmp_path / "out", alpha())
    other = write_capture(tmp_path / "out", beta())
    con = open_run(str(tmp_path / "out"), all_captures=True)
    write_page(con, tmp_path / "before.html", entries=("alpha",))
    for table in ("runs", "pairwise", "runs_topk", "pairwise_topk", "tokens", "vocabulary"):
        for file in other.glob(f"{table}*.parquet"):
            file.unlink()
    write_page(con, tmp_path / "after.html", entries=("alpha",))
    assert index_of(tmp_path / "after.html")["pairs"] == index_of(tmp_path / "before.html")["pairs"]


def test_entries_prompts_and_the_largest_prompts_are_chosen(con: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    chosen = lambda: {p["name"]: [s["prompt"] for s in p["sheets"]] for p in index_of(file)["pairs"]}  # noqa: E731
    write_page(con, file, entries=("beta",))
    assert chosen() == {"beta": [0, 0]}
    write_page(con, file, entries=("alpha",), prompts="1:5")
    assert chosen() == {"alpha": [1]}
    rows = con.execute("SELECT prompt_idx FROM pairwise WHERE pair = 'alpha' AND comparison = 'BB-SS' GROUP BY 1 "
                       "ORDER BY avg(kl_divergence) DESC").fetchall()  # fmt: skip
    write_page(con, file, entries=("alpha",), top_prompts=1)
    assert chosen() == {"alpha": [rows[0][0]]}
    write_page(con, file, entries=("alpha",), top_prompts=9)
    assert chosen() == {"alpha": [p for (p,) in rows]}


def test_of_a_pair_without_comparisons_the_first_prompts_are_kept(tmp_path: Path, call: Callable[..., Any]) -> None:
    tokens = {(prompt, "identity"): ["x", "y"] for prompt in range(4)}
    write_capture(tmp_path / "out", make_capture("p", "c", ("BB",), 1, tokens, {1}, 0))
    file = tmp_path / "page.html"
    assert call("html", tmp_path / "out", "-o", file, "--top-prompts", 2, "--prompts", "1:4").code == 0
    assert [sheet["prompt"] for sheet in index_of(file)["pairs"][0]["sheets"]] == [1, 2]


def test_lists_of_prompts_are_indices_and_ranges() -> None:
    assert parse_prompts("0, 3,5:9") == [(0, 1), (3, 4), (5, 9)]
    for wrong in ("", "a", "3:", "5:5", "-1", "1,,2"):
        with pytest.raises(QueryError, match="is not a list of prompt indices such as 0,3,5:9"):
            parse_prompts(wrong)


def test_the_verb_says_what_it_wrote_and_what_it_left_out(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    done = call("html", synthetic.out, "-o", file, "--entries", "alpha", "beta")
    assert done.code == 0
    assert done.err.splitlines()[0] == f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB, 2 pairs, prompts 4"
    assert "tokens of the lists show as ids for alpha, beta" in done.err
    done = call("html", synthetic.out, "-o", file, "--prompts", "1", "--entries", "alpha", "--top-k", 0)
    assert done.err.splitlines() == [f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB, 1 pair, prompts 1 of 2"]
    done = call("html", synthetic.out, "-o", file, "--include-partial")
    assert "3 pairs" in done.err
    assert index_of(file)["pairs"][2]["facts"]["complete"] is False


def test_a_prompt_that_one_of_the_pairs_lacks_is_named(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    done = call("html", synthetic.out, "-o", tmp_path / "page.html", "--prompts", "0,1")
    assert "  pair 'beta' has no prompt 1" in done.err.splitlines()
    assert "pair 'alpha'" not in done.err


@pytest.mark.parametrize(
    "table", ["tokens", "vocabulary", "tracked_tokens", "spectrum", "runs", "runs_topk", "pairwise", "pairwise_topk"]
)
def test_a_page_of_what_a_damaged_table_leaves(call: Callable[..., Any], tmp_path: Path, table: str) -> None:
    path = write_capture(tmp_path / "out", alpha())
    (file,) = (f for f in path.glob("*.parquet") if f.name in (f"{table}.parquet", f"{table}-00000.parquet"))
    file.write_bytes(file.read_bytes()[:-20])
    answer = call("html", tmp_path / "out", "-o", tmp_path / "page.html", "--lenient")
    assert answer.code == 0
    assert f"left out: '{file}'" in answer.err
    (pair,) = index_of(tmp_path / "page.html")["pairs"]
    assert [len(sheet["tokens"]) for sheet in pair["sheets"]] == [5, 3]
    assert [sheet["ids"] for sheet in pair["sheets"]] == (
        [[-1] * 5, [-1] * 3] if table == "tokens" else [[0, 1, 2, 3, 4], [10, 11, 12]]
    )
    assert [len(pair[k]) for k in ("runs", "comparisons")] == [
        0 if table == "runs" else 4,
        0 if table == "pairwise" else 6,
    ]


def test_a_capture_without_token_lists_is_not_told_to_make_room(call: Callable[..., Any], tmp_path: Path) -> None:
    path = write_capture(tmp_path / "out", alpha())
    marker = json.loads((path / "_COMPLETE").read_text())
    marker["files"] = [f for f in marker["files"] if "topk" not in f["name"]]
    (path / "_COMPLETE").write_text(json.dumps(marker))
    write_capture(tmp_path / "out", beta())
    file = tmp_path / "page.html"
    said = call("html", tmp_path / "out", "-o", file).err
    assert "no token lists of alpha: captured without them" in said
    assert "--max-mb" not in said
    assert [pair["has_lists"] for pair in index_of(file)["pairs"]] == [False, True]
    size = (file.stat().st_size - 400) / 1e6
    assert "--max-mb makes room" in call("html", tmp_path / "out", "-o", file, "--max-mb", size).err
    assert "has_lists ?" in file.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--entries", "alhpa"), r"no pair 'alhpa' here. Did you mean 'alpha'\?"),
        (("--entries", "gamma"), "no pair 'gamma' here"),  # partial
        (("--prompts", "7:9"), "pair 'alpha' has none of these prompts. There are 0 to 1."),
        (("--prompts", "0,99,7:9"), "--prompts: no prompt 99, 7:9 here"),
        (("--prompts", "x"), "--prompts 'x' is not a list of prompt indices"),
    ],
)
def test_a_wrong_call_is_one_clear_error(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = call("html", synthetic.out, "-o", tmp_path / "page.html", *options)
    assert done.code == 2
    assert re.search(message, done.err)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(
    synthetic: Any, call: Callable[..., Any], con: Any, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"cannot write the page '.*/no/page.html': No such file"):
        write_page(con, tmp_path / "no" / "page.html")
    with pytest.raises(StoreError, match="it is a directory"):
        write_page(con, tmp_path)
    assert call("html", tmp_path / "nothing", "-o", tmp_path / "page.html").code == 2
    for wrong in (0, "nan", "inf", "-inf"):
        assert call("html", synthetic.out, f"--max-mb={wrong}").code == 2
    assert call("html", synthetic.out, "--entries").code == 2
