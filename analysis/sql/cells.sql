-- Every cell of a metric that has a finite value, under one set of names: the source of the macros below.
-- metric: a column of pairwise_full, or with record := 'runs' of runs. label: the comparison, or the pass; base_run and sft_run are its
-- two passes (or the pass, and null): to group by them is twice as fast as by the label, which is put together row by row.
-- skip_first leaves out the first so many positions, skip_special the tokenizer's special tokens: their states are often
-- hundreds of times larger than those of words, and would be all that one sees.
-- twins := false leaves out layer L of what the lens says where that is the same as at L-1 (captures.twin_layer).
CREATE OR REPLACE MACRO cells(metric, record := 'pairwise', skip_first := 0, skip_special := false, twins := true) AS TABLE
SELECT *
FROM query(
  'SELECT pair, capture, prompt_idx, variant, '
  || CASE WHEN record = 'runs' THEN 'run AS base_run, NULL::VARCHAR AS sft_run, run' ELSE 'base_run, sft_run, comparison' END
  || ' AS label, layer, position, "'
  || replace(metric, '"', '""') || '"::DOUBLE AS value FROM ' || cells_source(metric, record)
  || ' WHERE isfinite(value)'
  || CASE WHEN skip_first > 0 THEN ' AND position >= ' || skip_first ELSE '' END
  || CASE WHEN skip_special
       THEN ' AND (pair, capture, prompt_idx, variant, position) NOT IN'
         || ' (SELECT (pair, capture, prompt_idx, variant, position) FROM tokens WHERE is_special)'
       ELSE '' END
  || CASE WHEN NOT twins AND lower(metric) IN (
       'kl_divergence', 'kl_reverse', 'kl_div', 'top1_agree', 'entropy', 'entropy_base', 'entropy_sft', 'entropy_delta',
       'next_token_logprob'
     )
       THEN ' AND (pair, capture, layer) NOT IN'
         || ' (SELECT (pair, capture, twin_layer) FROM captures WHERE twin_layer IS NOT NULL)'
       ELSE '' END
);
