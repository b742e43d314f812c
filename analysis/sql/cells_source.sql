-- The cheapest view that has a metric: pairwise_full reads runs twice, so it is asked only for what it alone has.
CREATE OR REPLACE MACRO cells_source(metric, record) AS CASE
  WHEN record NOT IN ('runs', 'pairwise') THEN error('no record type ''' || record || '''; there are: runs, pairwise')
  WHEN record = 'runs' THEN 'runs'
  WHEN lower(metric) IN (
    'norm_base', 'norm_sft', 'norm_delta', 'norm_diff_relative', 'entropy_base', 'entropy_sft', 'entropy_delta',
    'base_cosine_prev', 'base_norm_delta', 'sft_cosine_prev', 'sft_norm_delta'
  ) THEN 'pairwise_full'
  ELSE 'pairwise'
END;
