"""Open a stream, say the folder of its shared memory, and read on whenever a line comes in. usage: PATH [REMOTE]"""

from __future__ import annotations

import sys

from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.shards import open_shards
from bd3_scale.data.stream import TrainingStream
from bd3_scale.recipe.schema import DataRecipe

if __name__ == "__main__":
    path, remote = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    manifest = load_manifest(path, remote)
    data = DataRecipe(path=path, remote=remote, seq_len=manifest.seq_len, num_workers=1)
    stream = TrainingStream(data, manifest, global_batch_size=4, dp_rank=0, dp_size=1, seed=1)
    print(next(stream).ids.tolist(), flush=True)
    print(open_shards(data, manifest, "train").files.shared_folder, flush=True)
    for _ in sys.stdin:
        print(next(stream).ids.tolist(), flush=True)
