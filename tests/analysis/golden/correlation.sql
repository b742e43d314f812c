SELECT pair, capture, prompt_idx, variant, label, CASE WHEN min(value) < max(value) AND min(value2) < max(value2)
  THEN corr(value, value2) END AS correlation
FROM (
SELECT pair, capture, prompt_idx, variant, comparison AS label, layer, position, kl_div::DOUBLE AS value, norm_base::DOUBLE AS value2
FROM pairwise_full
WHERE pair = ? AND starts_with(capture, ?) AND prompt_idx = ? AND variant = ? AND comparison = ? AND prompt_idx BETWEEN ? AND ?
AND isfinite(kl_div::DOUBLE)
)
WHERE isfinite(value2)
GROUP BY pair, capture, prompt_idx, variant, label
