SELECT * EXCLUDE hot, hot.value AS largest, -hot.minus_layer AS layer, -hot.minus_position AS position
FROM (
SELECT pair, capture, prompt_idx, variant, comparison AS label, token_id, direction, count(*) AS cells,
  max(struct_pack(size := abs(shift), minus_layer := -layer, minus_position := -position, value := shift)) AS hot
FROM topk_shift WHERE pair = ? AND starts_with(capture, ?) AND prompt_idx = ? AND variant = ? AND comparison = ? AND prompt_idx BETWEEN ? AND ? AND token_id IN (7)
GROUP BY ALL
)
ORDER BY pair, capture, prompt_idx, variant, label, token_id, direction DESC
