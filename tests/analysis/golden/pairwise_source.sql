SELECT
  pair, capture, prompt_idx, variant, base_run, sft_run, layer, position, cosine_distance, norm_diff, kl_divergence, kl_reverse, top1_agree,
  base_run || '-' || sft_run AS comparison,
  1 - cosine_distance::DOUBLE AS cosine_sim,
  kl_divergence AS kl_div
FROM _files_pairwise
