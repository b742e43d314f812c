"""Numbers: run a pair of models through its passes and write what the residual streams say.

Imports torch, transformers, safetensors and pyarrow; never ray, duckdb, cluster or analysis.
`schema`, `layout`, `manifest`, `config` and `errors` are light (no torch) and are what the other packages may import.
"""

__version__ = "0.1.0"
