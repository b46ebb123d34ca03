"""Load the manifests and indices of a run's data once on each machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from bd3_scale.data.index import ShardTable
from bd3_scale.data.manifest import MANIFEST_FILE, Manifest, combine, load_parts, parse_manifest, with_shards
from bd3_scale.parallel.collective import on_first_of_node
from bd3_scale.recipe.data import DataRecipe
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import read_regular


def load_sources_of_node(data: DataRecipe) -> Manifest:
    """Return what `load_sources` returns; one rank of each node fetches and reads the files (collective).

    The JSON of an index of 600,000 shards has 350 MB, which every rank would have to parse. Its table has 17 MB, which
    the ranks of a node share in memory.
    """
    with ExitStack() as stack:

        def save_manifests() -> str:
            folder = stack.enter_context(temporary_folder("manifests"))
            for number, manifest in enumerate(load_parts(data).values()):
                _save(manifest, folder / str(number))
            return str(folder)

        folder = Path(on_first_of_node(save_manifests))
        parts = {name: _load(folder / str(number)) for number, name in enumerate(data.by_source)}
        on_first_of_node(lambda: None)  # wait until all ranks have opened the files, which are removed now
    return combine(parts)


def _save(manifest: Manifest, folder: Path) -> None:
    folder.mkdir()
    (folder / MANIFEST_FILE).write_text(manifest.without_shards(), encoding="utf-8")
    for name, split in manifest.splits.items():
        split.shards.save(folder / name)


def _load(folder: Path) -> Manifest:
    manifest = parse_manifest(folder, read_regular(folder / MANIFEST_FILE))
    return with_shards(manifest, lambda name: ShardTable.load(folder / name))
