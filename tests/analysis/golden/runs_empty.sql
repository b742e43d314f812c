SELECT
  pair, capture, prompt_idx, variant, run, layer, position, norm, norm_delta, cosine_distance_prev, entropy, next_token_logprob, tracked_logits,
  1 - cosine_distance_prev::DOUBLE AS cosine_prev
FROM (SELECT NULL::VARCHAR AS pair, NULL::VARCHAR AS capture, NULL::INTEGER AS prompt_idx, NULL::VARCHAR AS variant, NULL::VARCHAR AS run, NULL::SMALLINT AS layer, NULL::INTEGER AS position, NULL::FLOAT AS norm, NULL::FLOAT AS norm_delta, NULL::FLOAT AS cosine_distance_prev, NULL::FLOAT AS entropy, NULL::FLOAT AS next_token_logprob, NULL::FLOAT[] AS tracked_logits)
WHERE false
