SELECT pair, capture, label, count(*) AS n, min(value) AS min, quantile_cont(value, 0.25) AS q1,
  median(value) AS median, quantile_cont(value, 0.75) AS q3, max(value) AS max, avg(value) AS mean,
  stddev_pop(value) AS std
FROM (
SELECT pair, capture, prompt_idx, variant, run AS label, layer, position, norm::DOUBLE AS value
FROM runs
WHERE run = ?
AND isfinite(norm::DOUBLE)
)
GROUP BY pair, capture, label
ORDER BY pair, capture, label
