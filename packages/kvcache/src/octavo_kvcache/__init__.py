"""A block-table KV cache: reference counts, copy-on-write forks, and an exact prefix cache."""
