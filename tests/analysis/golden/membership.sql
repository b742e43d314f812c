SELECT pair, capture, prompt_idx, variant, comparison AS label, token_id, direction, count(*) AS cells,
  arg_max(shift, abs(shift)) AS largest, arg_max(layer, abs(shift)) AS layer,
  arg_max(position, abs(shift)) AS position
FROM topk_shift WHERE pair = ? AND starts_with(capture, ?) AND prompt_idx = ? AND variant = ? AND comparison = ? AND prompt_idx BETWEEN ? AND ? AND token_id IN (7)
GROUP BY ALL
ORDER BY pair, capture, prompt_idx, variant, label, token_id, direction DESC
