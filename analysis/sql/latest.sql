-- The id of a pair's newest capture: what a grid shows where no capture is named.
CREATE OR REPLACE MACRO latest(of_pair) AS (
  SELECT arg_max(c.capture, (c.complete, coalesce(c.written, TIMESTAMP '1970-01-01'), c.capture))
  FROM captures AS c
  WHERE c.pair = of_pair
);
