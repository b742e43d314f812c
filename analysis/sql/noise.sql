-- capture.json keeps one list per pass and metric, from layer -1 up. Only of captures that the other tables hold.
WITH passes AS (
  SELECT pair, capture, json, unnest(json_keys(json, '$.noise_floor.by_run_and_layer')) AS run
  FROM captures
  WHERE (pair, capture) IN (SELECT (pair, capture) FROM prompts)
), lists AS (
  SELECT
    pair, capture, run,
    json_extract(json, '$.noise_floor.by_run_and_layer."' || run || '".norm_diff')::DOUBLE[] AS norm_diff,
    json_extract(json, '$.noise_floor.by_run_and_layer."' || run || '".norm_diff_relative')::DOUBLE[] AS relative,
    json_extract(json, '$.noise_floor.by_run_and_layer."' || run || '".cosine_distance')::DOUBLE[] AS cosine_distance
  FROM passes
)
SELECT
  pair, capture, run, (generate_subscripts(norm_diff, 1) - 2)::SMALLINT AS layer,
  unnest(norm_diff) AS norm_diff, unnest(relative) AS norm_diff_relative, unnest(cosine_distance) AS cosine_distance
FROM lists
