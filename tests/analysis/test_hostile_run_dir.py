"""A run directory that somebody else made, or broke: every verb answers or gives one of our errors, and stays inside it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from odd import changed
from pyarrow import parquet
from synthetic import ALPHA, alpha, beta, write_attempt, write_capture

from analysis.captures import captures_table, manifest_table
from analysis.run import open_run_dir
from analysis.status import memory_lines, status_rows, table_lines
from analysis.tables import json_line
from capture.attempt import check_output
from capture.errors import StoreError
from capture.layout import RunDir

VERBS = (
    ("status",), ("status", "--json"), ("status", "--all", "--memory"), ("sql", "FROM captures"), ("sql", "--json", "FROM manifest"),
    ("sql", "SELECT count(*) FROM pairwise"), ("sql", "--lenient", "SELECT count(*) FROM runs"),
    ("sql", "--include-partial", "SELECT count(*) FROM pairwise"), ("report", "--pair", "alpha", "--prompt", "0"),
    ("grid", "--pair", "alpha", "--metric", "norm_diff"), ("catalog",),
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 1e400, 10**30, "", "x", "../../../../etc/passwd", "\ud800", "\x1b[2J\x9b2J\u202e", [], [1], [None], {}, {"a": {"b": []}},
)  # fmt: skip
# what a terminal acts on: all controls but the ends of lines and tabs
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write_capture(out, alpha())
    write_capture(out, beta())
    write_attempt(
        out, "1", entry="alpha", capture=ALPHA, state="complete", started="2025-01-01T00:00:01.000", seconds=3.5
    )
    return out


def capture_dir(out: Path) -> Path:
    return out / "captures" / "pair=alpha" / f"capture={ALPHA}"


def ask(call: Callable[..., Any], out: Path, verbs: tuple[tuple[str, ...], ...] = VERBS) -> list[Any]:
    """Every verb's answer; a bug is raised by `call`. Whatever comes out can be printed and steers nothing."""
    answers = [call(verb, out, *options) for verb, *options in verbs]
    for answer in answers:
        assert answer.code in (0, 1, 2)
        assert STEERS.findall(answer.out) == []
        answer.out.encode()
    return answers


def look_at(out: Path) -> None:
    """All that the verbs read of JSON, without DuckDB, which takes its time."""
    run = open_run_dir(str(out))
    rows = status_rows(run, every_attempt=True)
    said = [*table_lines(rows, 80), *memory_lines(rows), *map(json_line, rows)]
    assert STEERS.findall("".join(said)) == []
    with contextlib.suppress(StoreError):
        captures_table(run, list(run.captures(include_partial=True)))
        manifest_table(run)


@pytest.mark.parametrize("file", ["_COMPLETE", "capture.json", "manifest"])
def test_odd_values_in_any_file_of_json(made: Path, call: Callable[..., Any], file: str) -> None:
    path = next((made / "manifest").glob("*.json")) if file == "manifest" else capture_dir(made) / file
    content = json.loads(path.read_text())
    rng = random.Random(file)
    for _ in range(60):
        path.write_text(json.dumps(changed(rng, content, ODD)))
        look_at(made)
    ask(call, made, tuple(rng.sample(VERBS, 3)))


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[" * 100_000, b"nan", b'{"a":1}', b"[{}]", b"9" * 10_000, b"null"]
)
@pytest.mark.parametrize("file", ["_COMPLETE", "capture.json", "manifest/1.json"])
def test_what_is_no_json_of_ours(made: Path, file: str, content: bytes) -> None:
    (made / file if "/" in file else capture_dir(made) / file).write_bytes(content)
    look_at(made)


@pytest.mark.parametrize(
    "name", ["../../../../secret.parquet", "pairwise-/../../../../secret.parquet", "/etc/passwd", "pairwise-\x00", ".", "..", "", "pairwise-..\\x"]
)  # fmt: skip
def test_no_name_in_a_marker_leads_out_of_the_capture(made: Path, call: Callable[..., Any], name: str) -> None:
    shutil.copy(capture_dir(made) / "pairwise-00000.parquet", made.parent / "secret.parquet")
    marker = json.loads((capture_dir(made) / "_COMPLETE").read_text())
    marker["files"].append({"name": name, "table": "pairwise", "rows": 1, "bytes": 1, "sha256": "0" * 64})
    (capture_dir(made) / "_COMPLETE").write_text(json.dumps(marker))
    (answer,) = ask(call, made, (("sql", "--json", "SELECT pair FROM captures"),))
    assert answer.rows == [{"pair": "beta"}]  # such a marker is none
    (answer,) = ask(call, made, (("status", "--json"),))
    assert {row["entry"]: row["state"] for row in answer.rows}["alpha"] == "missing"


def strays(made: Path) -> None:
    """What a file manager, a copy that broke off or somebody else leaves beside ours."""
    capture = capture_dir(made)
    for place in (made / "captures", capture.parent, capture, made / "manifest"):
        (place / ".DS_Store").write_bytes(b"x")
        os.close(os.open(bytes(place) + b"/\xff.json", os.O_CREAT))
        (place / "gone").symlink_to("nowhere")
    (made / "manifest" / "directory.json").mkdir()
    (made / "manifest" / "gone.json").symlink_to("nowhere")
    (made / "captures" / "pair=file").touch()
    (made / "captures" / "pair=loop").symlink_to("pair=loop")
    os.mkdir(bytes(made / "captures") + b"/pair=\xff")
    os.mkfifo(made / "manifest" / "pipe.json")  # a read would never end


def test_files_that_are_none_of_ours_are_passed_over(made: Path, call: Callable[..., Any]) -> None:
    before = [answer.rows for answer in ask(call, made, (VERBS[1], VERBS[4]))]
    strays(made)
    assert [answer.rows for answer in ask(call, made, (VERBS[1], VERBS[4]))] == before
    ask(call, made)
    check_output(RunDir(str(made)))


@pytest.mark.parametrize("name", ["captures", "manifest"])
def test_a_file_where_a_directory_belongs_is_named(made: Path, call: Callable[..., Any], name: str) -> None:
    shutil.rmtree(made / name)
    (made / name).touch()
    for answer in ask(call, made, (VERBS[0], VERBS[5])):
        assert f"cannot read '{made / name}': Not a directory" in answer.err
    with pytest.raises(StoreError, match="Not a directory"):
        check_output(RunDir(str(made)))


@pytest.mark.parametrize(
    "change",
    [
        {"driver": "{host}/\u00b2/1"}, {"driver": "{host}/" + "9" * 5000 + "/1"}, {"driver": "{host}/-1/1"}, {"started": 1}, {"started": [1]},
        {"attempt": "a\x00b"}, {"attempt": "a\ud800"}, {"attempt": "../../x"}, {"attempt": "x" * 400},
    ],
)  # fmt: skip
def test_an_attempt_that_nobody_made_is_settled_or_passed_over(made: Path, change: dict[str, Any]) -> None:
    row = {"attempt": "2", "entry": "alpha", "state": "running", "started": "2025-01-01T00:00:02.000"}
    change = {k: v.replace("{host}", socket.gethostname()) if isinstance(v, str) else v for k, v in change.items()}
    (made / "manifest" / "2.json").write_text(json.dumps(row | change))
    (made / "manifest" / "3.json").write_text(json.dumps(row | {"attempt": "3", "started": "2999-01-01T00:00:00.000"}))
    before = sorted(p for p in made.parent.rglob("*"))
    look_at(made)
    check_output(RunDir(str(made)))
    assert sorted(p for p in made.parent.rglob("*")) == before


def test_a_name_that_is_a_query_stays_a_name(made: Path, call: Callable[..., Any]) -> None:
    odd = "pair=a'); COPY (SELECT 1) TO 'pwned.csv'; --"
    shutil.copytree(capture_dir(made).parent, made / "captures" / odd)
    answers = ask(call, made, (VERBS[0], VERBS[5]))
    assert answers[0].code == 0
    assert answers[1].code == 0
    assert not list(made.parent.rglob("pwned.csv"))
    assert not Path("pwned.csv").exists()


def test_escape_sequences_in_prompts_tokens_errors_and_names_do_not_reach_the_terminal(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31mred\u202egnp\r\n\x7f"
    capture = alpha()
    capture.tokens[0, "identity"][1] = evil
    write_capture(tmp_path / "out", capture)
    write_attempt(tmp_path / "out", "1", entry=f"alpha{evil}", capture=ALPHA, state="failed", started="2025-01-01T00:00:01.000",
                  error_class="CheckpointError", error=f"no {evil}", gpu=evil, mode=evil)  # fmt: skip
    answers = ask(call, tmp_path / "out", (
        *VERBS, ("sql", "SELECT * FROM tokens"), ("sql", "--json", "SELECT * FROM tokens"), ("grid", "--pair", "alpha", "--run", "BB", "--metric", "norm"),
        ("report", "--json"), ("sql", f"SELECT '{evil}' AS x, error('{evil}')"),
    ))  # fmt: skip
    assert any("\\x1b" in answer.out for answer in answers)
    texts = [row["token"] for row in answers[-4].rows]
    assert evil in texts  # JSON says the same text


def test_the_names_of_pairs_that_a_page_tells_of_are_escaped_and_few(tmp_path: Path, call: Callable[..., Any]) -> None:
    """Those whose tokens have no texts stood there raw, all of them."""
    for i in range(7):
        path = write_capture(tmp_path / "out", replace(alpha(), pair=f"p{i}\x1b[2J"))
        marker = json.loads((path / "_COMPLETE").read_text())
        marker["files"] = [f for f in marker["files"] if f["name"] not in ("vocabulary.parquet", "tokens.parquet")]
        (path / "_COMPLETE").write_text(json.dumps(marker))
    said = call("html", tmp_path / "out", "-o", tmp_path / "page.html").err
    assert "\x1b" not in said
    assert "show as ids for p0\\x1b[2J, p1" in said
    assert "p4\\x1b[2J and 2 more: these captures have no texts of them" in said


def test_a_table_of_other_columns_or_values_is_an_error_that_names_it(made: Path, call: Callable[..., Any]) -> None:
    file = capture_dir(made) / "pairwise-00000.parquet"
    table = parquet.read_table(file)
    for odd in (
        table.drop_columns(["norm_diff"]),
        table.set_column(table.schema.get_field_index("norm_diff"), "norm_diff", pa.array(["x"] * len(table))),
        table.set_column(table.schema.get_field_index("layer"), "layer", pa.array([None] * len(table), pa.int16())),
        table.set_column(table.schema.get_field_index("prompt_idx"), "prompt_idx", pa.array([[1]] * len(table))),
        table.slice(0, 0),
    ):
        parquet.write_table(odd, file)
        ask(call, made, (VERBS[5], VERBS[9]))
    file.write_bytes(b"PAR1" + bytes(range(256)) * 4 + b"PAR1")
    assert all(str(file) in answer.err for answer in ask(call, made, (VERBS[5], VERBS[9])))
