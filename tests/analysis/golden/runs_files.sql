SELECT
  pair, capture, prompt_idx, variant, run, layer, position, norm, norm_delta, cosine_distance_prev, entropy, next_token_logprob, tracked_logits,
  1 - cosine_distance_prev::DOUBLE AS cosine_prev
FROM read_parquet([
  '/a/it''s.parquet',
  '/b/2.parquet'
], hive_partitioning = false)
