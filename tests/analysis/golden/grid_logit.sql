SELECT layer, position, sft::DOUBLE AS value
FROM (SELECT * FROM tracked_pairwise WHERE token_id = 7)
WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ? AND comparison = ?
