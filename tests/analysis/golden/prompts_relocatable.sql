SELECT
  pair, capture, prompt_idx, variant, text, n_tokens, n_tokens_before_trimming
FROM read_parquet([
  run_directory() || '/captures/1.parquet'
], hive_partitioning = false)
