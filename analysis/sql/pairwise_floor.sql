-- NaN is larger than all numbers here: beside the floor of a state that overflows, every difference would be none.
SELECT
  p.pair, p.capture, p.prompt_idx, p.variant, p.base_run, p.sft_run, p.comparison, p.layer, p.position,
  p.norm_diff, greatest(b.norm_diff, s.norm_diff) AS norm_diff_floor,
  p.cosine_distance, greatest(b.cosine_distance, s.cosine_distance) AS cosine_distance_floor,
  CASE
    WHEN isfinite(greatest(b.norm_diff, s.norm_diff)) AND NOT isnan(p.norm_diff)
      THEN p.norm_diff <= greatest(b.norm_diff, s.norm_diff)
  END AS below_floor
FROM pairwise AS p
LEFT JOIN noise AS b ON b.pair = p.pair AND b.capture = p.capture AND b.run = p.base_run AND b.layer = p.layer
LEFT JOIN noise AS s ON s.pair = p.pair AND s.capture = p.capture AND s.run = p.sft_run AND s.layer = p.layer
