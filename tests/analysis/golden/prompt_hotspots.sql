SELECT pair, capture, prompt_idx, variant, label, -hot.minus_layer AS layer, -hot.minus_position AS position, hot.value AS value
FROM (
SELECT pair, capture, prompt_idx, variant, label, unnest(max(struct_pack(size := abs(value), minus_layer := -layer,
  minus_position := -position, value := value), 5)) AS hot
FROM (
SELECT pair, capture, prompt_idx, variant, run AS label, layer, position, norm::DOUBLE AS value
FROM runs
WHERE run = ?
AND isfinite(norm::DOUBLE)
)
GROUP BY pair, capture, prompt_idx, variant, label
)
ORDER BY pair, capture, prompt_idx, variant, label, hot.size DESC, layer, position
