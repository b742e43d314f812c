"""From staged cells to a capture's tables: sorted by DuckDB within little memory, written as a capture is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from analysis.json_cells import RUN_NUMBERS, SIDE_NUMBERS
from analysis.json_stage import Stage
from analysis.views import as_pattern, quote
from capture.layout import RunDir
from capture.schema import SCHEMA_VERSION, arrow_schema
from capture.store import ROW_GROUP, CaptureWriter

if TYPE_CHECKING:
    import duckdb

    from analysis.json_import import Prompt

MEMORY = "512MB"  # for the sort; more goes to disk
_KEYS = "prompt_idx, variant"


@dataclass(frozen=True)
class Shape:
    """What a file turned out to hold. last: its number of the state after the final norm: its highest layer unless it says another; None where it is not known."""

    pair: str
    capture: str
    prompts: list[Prompt]
    last: int | None
    tracked: tuple[int, ...]


def write_capture(run: RunDir, shape: Shape, stage: Stage, found: dict[str, Any]) -> None:
    """Write all tables, capture.json and the marker. found: what capture.json says under `imported`. Raises StoreError."""
    import duckdb

    writer = CaptureWriter(run, shape.pair, shape.capture)
    try:
        with duckdb.connect() as con:
            con.execute(f"SET memory_limit = {quote(MEMORY)}")
            con.execute(f"SET temp_directory = {quote(str(stage.directory / 'sort'))}")
            con.execute("SET preserve_insertion_order = false")
            con.execute("SET enable_progress_bar = false")  # it would stand on stdout
            _prepare(con, shape, stage)
            for table in ("prompts", "tokens", "tracked_tokens"):
                writer.table(table, _chunks(table, [_small(table, shape)]))
            for table, sql in _queries(shape).items():
                reader = con.sql(sql).to_arrow_reader(ROW_GROUP)
                writer.table(table, _chunks(table, reader), part=0)
        writer.finish(_document(shape, found))
    finally:
        writer.discard()


def _chunks(table: str, batches: Any) -> Iterator[dict[str, Any]]:
    schema = arrow_schema(table)
    for batch in batches:
        if batch.num_rows:
            yield {f.name: batch.column(f.name).cast(f.type) for f in schema}


def _small(table: str, shape: Shape) -> Any:
    keys = {"pair": shape.pair, "capture": shape.capture}
    rows: list[dict[str, Any]] = []
    if table == "tracked_tokens":
        rows = [{"slot": i, "token_id": t, "token": "", "label": str(t)} for i, t in enumerate(shape.tracked)]
    for p in sorted(shape.prompts, key=lambda p: (p.prompt_idx, p.variant)):
        one = {"prompt_idx": p.prompt_idx, "variant": p.variant}
        n = len(p.tokens)
        if table == "prompts":
            rows.append(one | {"text": p.text, "n_tokens": n, "n_tokens_before_trimming": n})
        elif table == "tokens":
            rows += [
                one | {"position": i, "token_id": -1, "token": t, "is_special": False} for i, t in enumerate(p.tokens)
            ]
    schema = arrow_schema(table)
    plain = pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])
    return pa.RecordBatch.from_pylist([keys | row for row in rows], schema=plain)


def _prepare(con: duckdb.DuckDBPyConnection, shape: Shape, stage: Stage) -> None:
    """Register what is small (which record is which prompt, which part which pass), and views with the tables' names."""
    int32, text = pa.int32(), pa.string()
    prompts = [(p.record, p.prompt_idx, p.variant) for p in shape.prompts]
    runs = [(p.record, i, name) for p in shape.prompts for i, name in p.runs.items()]
    pairs = [(p.record, i, *sides) for p in shape.prompts for i, sides in p.pairs.items()]
    fills = []  # passes that no part tells of, from the first comparison that has them
    for p in shape.prompts:
        known = set(p.runs.values())
        for i, sides in p.pairs.items():
            for side, name in zip(("base", "sft"), sides, strict=True):
                if name not in known:
                    known.add(name)
                    fills.append((p.record, i, side, name))
    for name, rows, fields in (
        ("prompt_of", prompts, (("record", int32), ("prompt_idx", int32), ("variant", text))),
        ("run_of", runs, (("record", int32), ("part", int32), ("run", text))),
        ("pair_of", pairs, (("record", int32), ("part", int32), ("base_run", text), ("sft_run", text))),
        ("fill_of", fills, (("record", int32), ("part", int32), ("side", text), ("run", text))),
    ):
        schema = pa.schema(list(fields))
        table = pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)
        con.register(f"_{name}", table)
        con.execute(f"CREATE TABLE {name} AS FROM _{name}")
    # the file's last layer is the state after the final norm: our layer L, with L = that + 1
    layer = "layer" if shape.last is None else f"(CASE WHEN layer = {shape.last} THEN {shape.last + 1} ELSE layer END)"
    for name in ("run", "pairwise", "rest"):
        con.execute(
            f"CREATE VIEW staged_{name} AS SELECT * REPLACE ({layer}::SMALLINT AS layer)\n"
            f"FROM read_parquet({quote(as_pattern(str(stage.path(name))))})"
        )
    numbers = ", ".join(f"s.{n}" for n in RUN_NUMBERS)
    lists = "s.ids, s.logits, s.tracked_ids, s.tracked"
    fill = {
        side: ", ".join(f"s.{next(k for k, v in SIDE_NUMBERS.items() if v == (side, n))} AS {n}" for n in RUN_NUMBERS)
        for side in ("base", "sft")
    }
    filled = "\n".join(
        f"UNION ALL\nSELECT s.record, f.run, s.layer, s.position, {fill[side]}, NULL AS ids, NULL AS logits, s.tracked_ids,\n"
        f"  s.tracked_{side} AS tracked\n"
        f"FROM staged_pairwise AS s JOIN fill_of AS f ON f.record = s.record AND f.part = s.part AND f.side = '{side}'"
        for side in ("base", "sft")
    )
    con.execute(
        f"CREATE VIEW all_runs AS SELECT s.record, r.run, s.layer, s.position, {numbers}, {lists}\n"
        f"FROM staged_run AS s JOIN run_of AS r USING (record, part)\n{filled}"
    )


def _queries(shape: Shape) -> dict[str, str]:
    """The SELECT of each large table."""
    who = f"{quote(shape.pair)} AS pair, {quote(shape.capture)} AS capture, p.prompt_idx, p.variant"
    cell = "layer, position"

    def slots(values: str) -> str:
        if not shape.tracked:
            return "NULL::FLOAT[]"
        picked = ", ".join(f"{values}[list_position(s.tracked_ids, {t})]" for t in shape.tracked)
        return f"CASE WHEN len(s.tracked_ids) > 0 THEN [{picked}] END"

    runs = f"FROM all_runs AS s JOIN prompt_of AS p USING (record)\nORDER BY {_KEYS}, run, {cell}"
    pairs = (
        "FROM staged_pairwise AS s JOIN pair_of AS n USING (record, part) JOIN prompt_of AS p USING (record)\n"
        f"ORDER BY {_KEYS}, base_run, sft_run, {cell}"
    )
    return {
        "runs": (
            f"SELECT {who}, s.run, s.layer, s.position, coalesce(s.norm, 'nan'::FLOAT) AS norm, s.norm_delta,\n"
            f"  s.cosine_prev AS cosine_distance_prev, s.entropy, NULL::FLOAT AS next_token_logprob,\n"
            f"  {slots('s.tracked')} AS tracked_logits\n{runs}"
        ),
        "runs_topk": (
            f"SELECT {who}, s.run, s.layer, s.position, s.ids, s.logits\n"
            f"{runs.replace('ORDER BY', 'WHERE len(s.ids) > 0' + chr(10) + 'ORDER BY')}"
        ),
        "pairwise": (
            f"SELECT {who}, n.base_run, n.sft_run, s.layer, s.position,\n"
            "  coalesce(s.cosine_sim, 'nan'::FLOAT) AS cosine_distance, coalesce(s.norm_diff, 'nan'::FLOAT) AS norm_diff,\n"
            f"  s.kl_div AS kl_divergence, NULL::FLOAT AS kl_reverse, NULL::BOOLEAN AS top1_agree\n{pairs}"
        ),
        "pairwise_topk": (
            f"SELECT {who}, n.base_run, n.sft_run, s.layer, s.position, s.increased_ids, s.increased, s.decreased_ids,\n"
            f"  s.decreased\n{pairs.replace('ORDER BY', 'WHERE len(s.increased_ids) + len(s.decreased_ids) > 0' + chr(10) + 'ORDER BY')}"
        ),
        "imported": (
            f"SELECT {who}, s.part_name AS part, s.layer, s.position, s.json\n"
            f"FROM (FROM staged_rest UNION ALL BY NAME {_conflicts()}) AS s JOIN prompt_of AS p USING (record)\n"
            f"ORDER BY {_KEYS}, part, {cell}"
        ),
    }


def _conflicts() -> str:
    """Cells of comparisons that say other than their passes do; as rests, so that an export says the same again."""
    alias = {"base": "b", "sft": "t"}
    differ = " OR ".join(f"s.{key} IS DISTINCT FROM {alias[side]}.{name}" for key, (side, name) in SIDE_NUMBERS.items())
    tracked = " OR ".join(
        f"s.tracked_ids IS DISTINCT FROM {a}.tracked_ids OR s.tracked_{side} IS DISTINCT FROM {a}.tracked"
        for side, a in alias.items()
    )
    numbers = ", ".join(
        f"{key} := {'1 - s.' + key + '::DOUBLE' if RUN_NUMBERS[name] else 's.' + key + '::DOUBLE'}"
        for key, (_, name) in SIDE_NUMBERS.items()
    )
    pairs = (
        "map(list_transform(s.tracked_ids, lambda i: i::VARCHAR), list_transform(range(1, len(s.tracked_ids) + 1),\n"
        "  lambda i: struct_pack(base := s.tracked_base[i]::DOUBLE, sft := s.tracked_sft[i]::DOUBLE)))"
    )
    return (
        "SELECT s.record, 'pairwise ' || s.part AS part_name, s.layer, s.position,\n"
        f"  to_json(struct_pack(under := struct_pack({numbers}, tracked_token_logits := {pairs})))::VARCHAR AS json\n"
        "FROM staged_pairwise AS s JOIN pair_of AS n USING (record, part)\n"
        "LEFT JOIN all_runs AS b ON b.record = s.record AND b.run = n.base_run AND b.layer = s.layer\n"
        "  AND b.position = s.position\n"
        "LEFT JOIN all_runs AS t ON t.record = s.record AND t.run = n.sft_run AND t.layer = s.layer\n"
        "  AND t.position = s.position\n"
        f"WHERE {differ} OR {tracked}"
    )


def _document(shape: Shape, found: dict[str, Any]) -> dict[str, Any]:
    runs = list(
        dict.fromkeys(n for p in shape.prompts for n in (*p.runs.values(), *(s for b in p.pairs.values() for s in b)))
    )
    pairs = list(dict.fromkeys(f"{a}-{b}" for p in shape.prompts for a, b in p.pairs.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "pair": shape.pair,
        "capture": shape.capture,
        "imported": found,
        "n_layers": None if shape.last is None else shape.last + 1,
        "n_prompts": len(shape.prompts),
        "n_tokens": sum(len(p.tokens) for p in shape.prompts),
        "passes": runs,
        "comparisons": pairs,
        "lens": {"norm": "none"},
    }
