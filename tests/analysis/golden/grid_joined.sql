SELECT layer, position, norm_base::DOUBLE AS value
FROM pairwise_full
WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ? AND comparison = ?
