"""Turn text into batches: tokenisers, preparation into MDS shards, and an exactly reproducible order of reading."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
