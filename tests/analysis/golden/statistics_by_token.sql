SELECT pair, capture, prompt_idx, variant, label, position, count(*) AS n, avg(value) AS mean, median(value) AS median,
  min(value) AS min, max(value) AS max, stddev_pop(value) AS std
FROM (
SELECT pair, capture, prompt_idx, variant, run AS label, layer, position, norm::DOUBLE AS value
FROM runs
WHERE run = ?
AND isfinite(norm::DOUBLE)
)
GROUP BY pair, capture, prompt_idx, variant, label, position
ORDER BY pair, capture, prompt_idx, variant, label, position
