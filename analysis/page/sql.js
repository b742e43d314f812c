// The question behind each figure, for `pairscope sql OUT` or a catalog: what the page shows, with all digits and all prompts.

const q = (text) => `'${String(text).replace(/'/g, "''")}'`;
const isLogit = (metric) => metric.startsWith("logit ");

const SQL = {
  where: (s) => `pair = ${q(s.pair.name)} AND capture = ${q(s.pair.capture)}`,
  prompt: (s) => `${SQL.where(s)}\n  AND prompt_idx = ${s.sheet.prompt} AND variant = ${q(s.sheet.variant)}`,
  masks: (s) => s.mask ? `, skip_first := ${s.first}, skip_special := true` : "",

  // cells of one view: layer, position, prompt_idx, variant, value
  cells(s, view = s.view, metric = s.metric) {
    const kind = viewKind(view);
    if (isLogit(metric)) {
      const [from, label, value] = kind === "comparison" ? ["tracked_pairwise", "comparison", "diff"] : ["tracked", "run", "logit"];
      const left = s.mask ? `\n    AND position >= ${s.first} AND (prompt_idx, variant, position) NOT IN (SELECT (prompt_idx, variant, position)
      FROM tokens WHERE is_special AND ${SQL.where(s)})` : "";
      return `(SELECT pair, capture, prompt_idx, variant, layer, position, ${label} AS label, ${value}::DOUBLE AS value
  FROM ${from} WHERE token_id = ${Number(metric.slice(6))} AND isfinite(value)${left})`;
    }
    return `cells(${q(metric)}${kind === "comparison" ? "" : ", record := 'runs'"}${SQL.masks(s)})`;
  },
  // the same with the effect of a view that is one
  source(s) {
    if (isEffect(s.view)) {
      const pick = (run) => `max(value) FILTER (label = '${run}')`;
      const sum = Object.entries(EFFECTS[s.view]).map(([run, w]) => `${w} * ${pick(run)}`).join(" + ").replace(/\+ -/g, "- ");
      return `(SELECT pair, capture, prompt_idx, variant, layer, position, ${q(s.view)} AS label,
    ${sum} AS value
  FROM ${SQL.cells(s)} GROUP BY ALL)`.replace("GROUP BY ALL", "GROUP BY pair, capture, prompt_idx, variant, layer, position");
    }
    return SQL.cells(s);
  },
  scope: (s) => s.scope === "prompt" ? SQL.prompt(s) : `${SQL.where(s)} AND variant = ${q(s.sheet.variant)}` +
    (s.pair.sheets.length < s.pair.prompts_total ? `\n  AND prompt_idx IN (${sheetsOf(s).map((x) => x.prompt).join(", ")})` : ""),

  noTwin(s) {
    const twin = twinLayer(s.pair, s.view, s.metric);
    return twin === null ? "" : `\n  AND layer <> ${Number(twin)}`; // the lens says the same there as one layer before
  },

  grid(s) {
    const plain = { ...s, mask: false };
    return `SELECT layer, position, value\nFROM ${SQL.source(plain)}\nWHERE ${SQL.prompt(s)}\n  AND label = ${q(s.view)}\nORDER BY layer, position`;
  },
  profile: (s) => `SELECT layer, quantile_cont(value, 0.1) AS p10, median(value) AS p50, quantile_cont(value, 0.9) AS p90
FROM ${SQL.source(s)}\nWHERE ${SQL.scope(s)}\n  AND label = ${q(s.view)}\nGROUP BY layer ORDER BY layer`,
  hotspots: (s, n) => `SELECT prompt_idx, layer, position, value,
  (value - avg(value) OVER same) / nullif(stddev_pop(value) OVER same, 0) AS z
FROM ${SQL.source(s)}\nWHERE ${SQL.scope(s)}\n  AND label = ${q(s.view)}${SQL.noTwin(s)}
WINDOW same AS (PARTITION BY layer)\nORDER BY abs(${s.order === "z" ? "z" : "value"}) DESC NULLS LAST LIMIT ${n}`,
  byToken: (s, layer) => `SELECT position, value\nFROM ${SQL.source({ ...s, mask: false })}\nWHERE ${SQL.prompt(s)}
  AND label = ${q(s.view)} AND layer = ${layer}\nORDER BY position`,
  byLayer: (s, position) => `SELECT layer, value\nFROM ${SQL.source({ ...s, mask: false })}\nWHERE ${SQL.prompt(s)}
  AND label = ${q(s.view)} AND position = ${position}\nORDER BY layer`,
  lists(s, layer, position) {
    const cell = `${SQL.prompt(s)}\n  AND layer = ${layer} AND position = ${position}`;
    return viewKind(s.view) === "comparison"
      ? `SELECT direction, rank, token_id, token, shift\nFROM topk_shift\nWHERE ${cell} AND comparison = ${q(s.view)}\nORDER BY direction DESC, rank`
      : `SELECT rank, token_id, token, logit\nFROM topk\nWHERE ${cell} AND run = ${q(s.view)}\nORDER BY rank`;
  },
  four: (s, labels) => `SELECT label, layer, avg(value) AS mean\nFROM ${SQL.cells(s, labels[0])}\nWHERE ${SQL.scope(s)}
  AND label IN (${labels.map(q).join(", ")})\nGROUP BY label, layer ORDER BY label, layer`,
  spectrum: (s) => `SELECT layer, effective_rank, participation_ratio, mean_shift_share, singular_values\nFROM spectrum
WHERE ${SQL.where(s)} AND variant = ${q(s.sheet.variant)}\n  AND base_run || '-' || sft_run = ${q(s.view)}\nORDER BY layer`,
};
