SELECT *
FROM (
SELECT pair, capture, prompt_idx, variant, run AS label, layer, position, norm::DOUBLE AS value
FROM runs
WHERE run = ?
AND isfinite(norm::DOUBLE)
)
ORDER BY abs(value) DESC, layer, position, pair, capture, prompt_idx, variant, label
LIMIT 5
