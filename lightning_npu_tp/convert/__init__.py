"""A transformers model becomes a sharded one, in place: modules swapped, parameters given their shards."""
