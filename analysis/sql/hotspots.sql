-- The n cells of largest absolute value over everything, with their tokens; at ties the lower layer, then the earlier position.
-- Where the lens says the same at L and at L-1, only L-1 is among them.
-- Norms grow with depth, so hotspots of norms are late layers: see hotspots_z.
CREATE OR REPLACE MACRO hotspots(metric, n := 20, record := 'pairwise', skip_first := 0, skip_special := false) AS TABLE
SELECT
  h.pair, h.capture, h.prompt_idx, h.variant, concat_ws('-', h.base_run, h.sft_run) AS label, h.layer, h.position, t.token, h.value
FROM (
  SELECT * EXCLUDE label
  FROM cells(metric, record := record, skip_first := skip_first, skip_special := skip_special, twins := false)
  ORDER BY abs(value) DESC, layer, position, pair, capture, prompt_idx, variant, base_run, sft_run
  LIMIT n
) AS h
LEFT JOIN tokens AS t
  ON t.pair = h.pair AND t.capture = h.capture AND t.prompt_idx = h.prompt_idx AND t.variant = h.variant
  AND t.position = h.position
ORDER BY abs(h.value) DESC, h.layer, h.position, h.pair, h.capture, h.prompt_idx, h.variant, h.base_run, h.sft_run;
