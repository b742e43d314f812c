SELECT
  p.pair, p.capture, p.prompt_idx, p.variant, p.base_run, p.sft_run, p.comparison, p.layer, p.position,
  t.slot, t.token_id, t.token, t.label,
  b.tracked_logits[t.slot + 1] AS base,
  s.tracked_logits[t.slot + 1] AS sft,
  b.tracked_logits[t.slot + 1]::DOUBLE - s.tracked_logits[t.slot + 1]::DOUBLE AS diff
FROM pairwise AS p
LEFT JOIN runs AS b
  ON b.pair = p.pair AND b.capture = p.capture AND b.prompt_idx = p.prompt_idx AND b.variant = p.variant
  AND b.run = p.base_run AND b.layer = p.layer AND b.position = p.position
LEFT JOIN runs AS s
  ON s.pair = p.pair AND s.capture = p.capture AND s.prompt_idx = p.prompt_idx AND s.variant = p.variant
  AND s.run = p.sft_run AND s.layer = p.layer AND s.position = p.position
JOIN tracked_tokens AS t ON t.pair = p.pair AND t.capture = p.capture
