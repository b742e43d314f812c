SELECT pair, capture, prompt_idx, variant, comparison AS label, layer, position, kl_div::DOUBLE AS value, norm_base::DOUBLE AS value2
FROM pairwise_full
WHERE pair = ? AND starts_with(capture, ?) AND prompt_idx = ? AND variant = ? AND comparison = ? AND prompt_idx BETWEEN ? AND ?
AND isfinite(kl_div::DOUBLE)
