-- The id of a pair's newest capture: what a grid shows where no capture is named.
CREATE OR REPLACE MACRO latest(of_pair) AS (
  SELECT any_value(c.capture)
  FROM captures AS c
  WHERE c.pair = of_pair AND c.newest
);
