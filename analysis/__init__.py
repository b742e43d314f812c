"""Questions: DuckDB and pyarrow over what capture wrote. Never imports torch, ray, cluster or capture's engine."""
