"""Filter a corpus and remove its near-duplicates with datatrove, for `bd3-scale data prepare`.

    python examples/filter_and_deduplicate.py corpus/ work/ --processes 8
    bd3-scale data prepare work/clean --out data/mine --tokenizer data/my-tokenizer --seq-len 512

It runs in an environment of its own (`pip install "datatrove[io,processing]" spacy`): datatrove needs a newer
huggingface_hub than the transformers of bd3_scale takes. What is done is not done again. On SLURM, give datatrove's
`SlurmPipelineExecutor` the same pipelines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.typeshelper import Languages

LANGUAGE = Languages.english
# Two texts that share 75% of their 5-grams are found with a probability of 77%; with 85% shared, 99%.
MINHASH = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


def run(name: str, work: str, tasks: int, processes: int, pipeline: Sequence[Any]) -> None:
    """Run one step's unfinished tasks; the step is cut into `tasks` that do not depend on each other."""
    logs = f"{work}/logs/{name}"
    LocalPipelineExecutor(pipeline=list(pipeline), tasks=tasks, workers=processes, logging_dir=logs).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder or URL of .jsonl, .jsonl.gz or .parquet files with a field `text`")
    parser.add_argument("work", help="folder or URL for what the steps write; `clean` in it is the result")
    parser.add_argument("--parquet", action="store_true", help="the corpus is Parquet")
    parser.add_argument("--tasks", type=int, default=8, help="parts of the work, the same at each call")
    parser.add_argument("--processes", type=int, default=8)
    asked = parser.parse_args()
    work, tasks, processes = asked.work, asked.tasks, asked.processes

    reader = ParquetReader(asked.corpus) if asked.parquet else JsonlReader(asked.corpus)
    filters = [GopherRepetitionFilter(language=LANGUAGE), GopherQualityFilter(language=LANGUAGE)]
    run("filter", work, tasks, processes, [reader, *filters, JsonlWriter(f"{work}/filtered")])

    filtered = JsonlReader(f"{work}/filtered")
    signatures, buckets, remove = (f"{work}/minhash/{name}" for name in ("signatures", "buckets", "remove"))
    signature = MinhashDedupSignature(signatures, config=MINHASH, language=LANGUAGE)
    run("signatures", work, tasks, processes, [filtered, signature])
    run("buckets", work, MINHASH.num_buckets, processes, [MinhashDedupBuckets(signatures, buckets, config=MINHASH)])
    run("clusters", work, 1, 1, [MinhashDedupCluster(buckets, remove, config=MINHASH)])
    run("clean", work, tasks, processes, [filtered, MinhashDedupFilter(remove), JsonlWriter(f"{work}/clean")])


if __name__ == "__main__":
    main()
