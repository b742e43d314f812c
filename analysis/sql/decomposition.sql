-- The 2 x 2 of a metric of passes m (a number of runs), per layer and token:
--   embeddings  = ((SB - BB) + (SS - BS)) / 2     what the fine-tune's embeddings change, over both kinds of blocks
--   blocks      = ((BS - BB) + (SS - SB)) / 2     what its blocks change, over both kinds of embeddings
--   interaction = SS - SB - BS + BB               by how much the one changes what the other does
--   total       = SS - BB                         = embeddings + blocks
-- where BB stands for m(BB), and so on. Null where one of the four passes has no number.
CREATE OR REPLACE MACRO decomposition(metric, skip_first := 0, skip_special := false) AS TABLE
SELECT
  pair, capture, prompt_idx, variant, layer, position, bb, bs, sb, ss,
  ((sb - bb) + (ss - bs)) / 2 AS embeddings, ((bs - bb) + (ss - sb)) / 2 AS blocks, ss - sb - bs + bb AS interaction,
  ss - bb AS total
FROM (
  SELECT
    pair, capture, prompt_idx, variant, layer, position, max(value) FILTER (base_run = 'BB') AS bb,
    max(value) FILTER (base_run = 'BS') AS bs, max(value) FILTER (base_run = 'SB') AS sb, max(value) FILTER (base_run = 'SS') AS ss
  FROM cells(metric, record := 'runs', skip_first := skip_first, skip_special := skip_special)
  GROUP BY pair, capture, prompt_idx, variant, layer, position
)
ORDER BY pair, capture, prompt_idx, variant, layer, position;
