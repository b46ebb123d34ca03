"""From text to batches: tokenisers, preparation into MDS shards, and exact reading of them."""
