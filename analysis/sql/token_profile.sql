-- Statistics of each token of each prompt over all layers: n, mean, std (of a population), min, median, max.
CREATE OR REPLACE MACRO token_profile(metric, record := 'pairwise', skip_first := 0, skip_special := false) AS TABLE
SELECT
  c.pair, c.capture, c.prompt_idx, c.variant, concat_ws('-', c.base_run, c.sft_run) AS label, c.position,
  any_value(t.token) AS token, count(*) AS n, avg(c.value) AS mean, stddev_pop(c.value) AS std, min(c.value) AS min, median(c.value) AS median, max(c.value) AS max
FROM cells(metric, record := record, skip_first := skip_first, skip_special := skip_special) AS c
LEFT JOIN tokens AS t
  ON t.pair = c.pair AND t.capture = c.capture AND t.prompt_idx = c.prompt_idx AND t.variant = c.variant
  AND t.position = c.position
GROUP BY c.pair, c.capture, c.prompt_idx, c.variant, c.base_run, c.sft_run, c.position
ORDER BY c.pair, c.capture, c.prompt_idx, c.variant, c.base_run, c.sft_run, c.position;
