SELECT * FROM (
SELECT pair, capture, prompt_idx, variant, comparison AS label, t.layer, t.position, t.token_id, t.label AS name,
  p.norm_diff::DOUBLE AS norm_diff, t.diff AS logit_diff
FROM (SELECT * FROM tracked_pairwise WHERE pair = ? AND starts_with(capture, ?) AND prompt_idx = ? AND variant = ? AND comparison = ? AND prompt_idx BETWEEN ? AND ?) AS t
JOIN pairwise AS p USING (pair, capture, prompt_idx, variant, comparison, layer, position)
WHERE isfinite(t.diff) AND abs(t.diff) >= 0.5 AND p.norm_diff >= 0.0 AND t.token_id IN (7, 9)
)
QUALIFY row_number() OVER (PARTITION BY pair, capture, prompt_idx, variant, label ORDER BY abs(logit_diff) DESC, layer, position, token_id) <= 5
ORDER BY pair, capture, prompt_idx, variant, label, abs(logit_diff) DESC, layer, position, token_id
