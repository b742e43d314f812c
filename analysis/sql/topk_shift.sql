-- Where a state overflows, shifts are no numbers and the ids beside them mean nothing.
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
  k.pair, k.capture, k.prompt_idx, k.variant, k.base_run, k.sft_run, k.base_run || '-' || k.sft_run AS comparison,
  k.layer, k.position, k.direction, k.rank, k.token_id, t.token, k.shift
FROM (
  SELECT
    pair, capture, prompt_idx, variant, base_run, sft_run, layer, position, 'increased' AS direction,
    generate_subscripts(increased_ids, 1) AS rank, unnest(increased_ids) AS token_id, unnest(increased) AS shift
  FROM pairwise_topk
  UNION ALL
  SELECT
    pair, capture, prompt_idx, variant, base_run, sft_run, layer, position, 'decreased' AS direction,
    generate_subscripts(decreased_ids, 1) AS rank, unnest(decreased_ids) AS token_id, unnest(decreased) AS shift
  FROM pairwise_topk
) AS k
LEFT JOIN spelled AS t ON t.pair = k.pair AND t.capture = k.capture AND t.token_id = k.token_id
WHERE NOT isnan(k.shift)
