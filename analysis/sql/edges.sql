-- The four edges of the 2 x 2 for a metric of comparisons, per layer and token: the embeddings exchanged under the base's
-- blocks (BB-SB) and under the fine-tune's (BS-SS), the blocks exchanged over the base's embeddings (BB-BS) and over the
-- fine-tune's (SB-SS); and the diagonal, both exchanged (BB-SS).
CREATE OR REPLACE MACRO edges(metric, skip_first := 0, skip_special := false) AS TABLE
SELECT
  pair, capture, prompt_idx, variant, layer, position,
  max(value) FILTER (base_run = 'BB' AND sft_run = 'SB') AS embeddings_under_base, max(value) FILTER (base_run = 'BS' AND sft_run = 'SS') AS embeddings_under_sft,
  max(value) FILTER (base_run = 'BB' AND sft_run = 'BS') AS blocks_over_base, max(value) FILTER (base_run = 'SB' AND sft_run = 'SS') AS blocks_over_sft,
  max(value) FILTER (base_run = 'BB' AND sft_run = 'SS') AS both
FROM cells(metric, skip_first := skip_first, skip_special := skip_special)
GROUP BY pair, capture, prompt_idx, variant, layer, position
ORDER BY pair, capture, prompt_idx, variant, layer, position;
