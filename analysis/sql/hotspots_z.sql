-- The n cells that stand out most within their layer: by |z|, z = (value - mean) / std over all cells of the same pair,
-- capture, label and layer (all prompts, variants and tokens that the masks leave); std is that of a population.
-- A layer whose cells are all equal has no z and no hotspot; where the lens says the same at L and at L-1, L has none.
CREATE OR REPLACE MACRO hotspots_z(metric, n := 20, record := 'pairwise', skip_first := 0, skip_special := false) AS TABLE
WITH layers AS (
  SELECT pair, capture, base_run, sft_run, layer, avg(value) AS mean, stddev_pop(value) AS std
  FROM cells(metric, record := record, skip_first := skip_first, skip_special := skip_special, twins := false)
  GROUP BY pair, capture, base_run, sft_run, layer
), ranked AS (
  SELECT c.* EXCLUDE label, (c.value - l.mean) / l.std AS z
  FROM cells(metric, record := record, skip_first := skip_first, skip_special := skip_special, twins := false) AS c
  JOIN layers AS l
    ON l.pair = c.pair AND l.capture = c.capture AND l.base_run = c.base_run
    AND l.sft_run IS NOT DISTINCT FROM c.sft_run AND l.layer = c.layer
  WHERE l.std > 0
  ORDER BY abs(z) DESC, c.layer, c.position, c.pair, c.capture, c.prompt_idx, c.variant, c.base_run, c.sft_run
  LIMIT n
)
SELECT
  h.pair, h.capture, h.prompt_idx, h.variant, concat_ws('-', h.base_run, h.sft_run) AS label, h.layer, h.position, t.token, h.value, h.z
FROM ranked AS h
LEFT JOIN tokens AS t
  ON t.pair = h.pair AND t.capture = h.capture AND t.prompt_idx = h.prompt_idx AND t.variant = h.variant
  AND t.position = h.position
ORDER BY abs(h.z) DESC, h.layer, h.position, h.pair, h.capture, h.prompt_idx, h.variant, h.base_run, h.sft_run;
