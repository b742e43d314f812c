SELECT
  r.pair, r.capture, r.prompt_idx, r.variant, r.run, r.layer, r.position,
  t.slot, t.token_id, t.token, t.label,
  r.tracked_logits[t.slot + 1] AS logit
FROM runs AS r
JOIN tracked_tokens AS t ON t.pair = r.pair AND t.capture = r.capture
WHERE r.tracked_logits IS NOT NULL
