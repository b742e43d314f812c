-- The 2 x 2 of the residual states themselves, per layer and token, as norms of vectors (x_BB is the state of pass BB):
--   embeddings  = | ((x_SB - x_BB) + (x_SS - x_BS)) / 2 |
--   blocks      = | ((x_BS - x_BB) + (x_SS - x_SB)) / 2 |
--   interaction = | x_SS - x_SB - x_BS + x_BB |
--   total       = | x_SS - x_BB |
-- No state is stored and none is needed: for weights c that sum to 0, |sum c_i x_i|^2 = - sum over pairs of c_i c_j d_ij^2,
-- and the six distances d_ij are norm_diff. They are float32: an effect below a thousandth of the largest of the six is noise.
CREATE OR REPLACE MACRO decomposition_states(skip_first := 0, skip_special := false) AS TABLE
SELECT
  pair, capture, prompt_idx, variant, layer, position,
  sqrt(greatest(0, bb_sb + bb_ss + bs_sb + bs_ss - bb_bs - sb_ss)) / 2 AS embeddings,
  sqrt(greatest(0, bb_bs + bb_ss + bs_sb + sb_ss - bb_sb - bs_ss)) / 2 AS blocks,
  sqrt(greatest(0, bb_bs + bb_sb + bs_ss + sb_ss - bb_ss - bs_sb)) AS interaction,
  sqrt(bb_ss) AS total
FROM (
  SELECT
    pair, capture, prompt_idx, variant, layer, position,
    max(value ** 2) FILTER (base_run = 'BB' AND sft_run = 'BS') AS bb_bs, max(value ** 2) FILTER (base_run = 'BB' AND sft_run = 'SB') AS bb_sb,
    max(value ** 2) FILTER (base_run = 'BB' AND sft_run = 'SS') AS bb_ss, max(value ** 2) FILTER (base_run = 'BS' AND sft_run = 'SB') AS bs_sb,
    max(value ** 2) FILTER (base_run = 'BS' AND sft_run = 'SS') AS bs_ss, max(value ** 2) FILTER (base_run = 'SB' AND sft_run = 'SS') AS sb_ss
  FROM cells('norm_diff', skip_first := skip_first, skip_special := skip_special)
  GROUP BY pair, capture, prompt_idx, variant, layer, position
)
WHERE bb_bs IS NOT NULL AND bb_sb IS NOT NULL AND bb_ss IS NOT NULL AND bs_sb IS NOT NULL AND bs_ss IS NOT NULL
  AND sb_ss IS NOT NULL
ORDER BY pair, capture, prompt_idx, variant, layer, position;
