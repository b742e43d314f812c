-- Where states overflow, logits are no numbers and the ids beside them mean nothing.
-- Decoded texts are preferred to the tokenizer's own spelling. An imported capture has no text of most ids: they show null.
WITH spelled AS (
  SELECT pair, capture, token_id, arg_min(token, source) AS token
  FROM (
    SELECT pair, capture, token_id, token, 0 AS source FROM tokens
    UNION ALL
    SELECT pair, capture, token_id, token, 0 AS source FROM vocabulary
    UNION ALL
    SELECT pair, capture, token_id, token, 1 AS source FROM tracked_tokens WHERE token <> ''
  )
  GROUP BY pair, capture, token_id
)
SELECT
  k.pair, k.capture, k.prompt_idx, k.variant, k.run, k.layer, k.position, k.rank, k.token_id, t.token, k.logit
FROM (
  SELECT
    pair, capture, prompt_idx, variant, run, layer, position,
    generate_subscripts(ids, 1) AS rank, unnest(ids) AS token_id, unnest(logits) AS logit
  FROM runs_topk
) AS k
LEFT JOIN spelled AS t ON t.pair = k.pair AND t.capture = k.capture AND t.token_id = k.token_id
WHERE NOT isnan(k.logit)
