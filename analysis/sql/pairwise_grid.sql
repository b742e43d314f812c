-- One layer x token grid of a comparison: layer, position, token, value.
-- metric: a number of pairwise_full. capture: by default the pair's newest.
CREATE OR REPLACE MACRO pairwise_grid(pair, prompt, comparison, metric, variant := 'identity', capture := NULL) AS TABLE
SELECT g.layer, g.position, t.token, g.value
FROM query(
  'SELECT pair, capture, prompt_idx, variant, comparison, layer, position, "' || replace(metric, '"', '""')
  || '"::DOUBLE AS value FROM ' || cells_source(metric, 'pairwise')
) AS g
LEFT JOIN tokens AS t
  ON t.pair = g.pair AND t.capture = g.capture AND t.prompt_idx = g.prompt_idx AND t.variant = g.variant
  AND t.position = g.position
WHERE g.pair = pair AND g.capture = coalesce(capture, latest(pair)) AND g.prompt_idx = prompt AND g.variant = variant
  AND g.comparison = comparison
ORDER BY g.layer, g.position;
