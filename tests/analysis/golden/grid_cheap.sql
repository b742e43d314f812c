SELECT layer, position, kl_div::DOUBLE AS value
FROM pairwise
WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ? AND comparison = ?
