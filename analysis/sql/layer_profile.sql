-- Statistics of each layer over all prompts, variants and tokens: n, mean, std (of a population), min, p10, median, p90, max.
CREATE OR REPLACE MACRO layer_profile(metric, record := 'pairwise', skip_first := 0, skip_special := false) AS TABLE
SELECT
  pair, capture, concat_ws('-', base_run, sft_run) AS label, layer, count(*) AS n, avg(value) AS mean, stddev_pop(value) AS std, min(value) AS min,
  quantile_cont(value, 0.1) AS p10, median(value) AS median, quantile_cont(value, 0.9) AS p90, max(value) AS max
FROM cells(metric, record := record, skip_first := skip_first, skip_special := skip_special)
GROUP BY pair, capture, base_run, sft_run, layer
ORDER BY pair, capture, base_run, sft_run, layer;
