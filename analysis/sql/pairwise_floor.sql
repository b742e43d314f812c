-- NaN is larger than all numbers here: beside the floor of a state that overflows, every difference would be none. Where one pass's
-- floor is not known (null; older captures have NaN), neither is the larger of both.
WITH floors AS (
  SELECT
    b.pair, b.capture, b.layer, b.run AS base_run, s.run AS sft_run,
    if(b.norm_diff IS NULL OR s.norm_diff IS NULL, NULL, greatest(b.norm_diff, s.norm_diff)) AS norm_diff,
    if(b.cosine_distance IS NULL OR s.cosine_distance IS NULL, NULL, greatest(b.cosine_distance, s.cosine_distance)) AS cosine_distance
  FROM noise AS b
  JOIN noise AS s ON s.pair = b.pair AND s.capture = b.capture AND s.layer = b.layer
)
SELECT
  p.pair, p.capture, p.prompt_idx, p.variant, p.base_run, p.sft_run, p.comparison, p.layer, p.position,
  p.norm_diff, f.norm_diff AS norm_diff_floor, p.cosine_distance, f.cosine_distance AS cosine_distance_floor,
  CASE WHEN isfinite(f.norm_diff) AND NOT isnan(p.norm_diff) THEN p.norm_diff <= f.norm_diff END AS below_floor
FROM pairwise AS p
LEFT JOIN floors AS f
  ON f.pair = p.pair AND f.capture = p.capture AND f.base_run = p.base_run AND f.sft_run = p.sft_run AND f.layer = p.layer
