"""What the data of a run say of themselves, read once on each machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from bd3_scale.data.index import ShardTable
from bd3_scale.data.manifest import MANIFEST_FILE, Manifest, load_parts, mixed, parse_manifest, with_shards
from bd3_scale.parallel.collective import on_first_of_node
from bd3_scale.recipe.data import DataRecipe
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import read_regular


def load_sources_of_node(data: DataRecipe) -> Manifest:
    """Return what `load_sources` does, of which one rank of each node fetches and reads the files (collective).

    An index of 600,000 shards is 350 MB of JSON; what it says is 17 MB that the ranks of a node share.
    """
    with ExitStack() as stack:

        def kept() -> str:
            folder = stack.enter_context(temporary_folder("manifests"))
            for number, manifest in enumerate(load_parts(data).values()):
                _keep(manifest, folder / str(number))
            return str(folder)

        folder = Path(on_first_of_node(kept))
        parts = {name: _kept(folder / str(number)) for number, name in enumerate(data.by_source)}
        on_first_of_node(lambda: None)  # all have opened what is removed now
    return mixed(parts)


def _keep(manifest: Manifest, folder: Path) -> None:
    folder.mkdir()
    (folder / MANIFEST_FILE).write_text(manifest.without_shards(), encoding="utf-8")
    for name, split in manifest.splits.items():
        split.shards.save(folder / name)


def _kept(folder: Path) -> Manifest:
    manifest = parse_manifest(folder, read_regular(folder / MANIFEST_FILE))
    return with_shards(manifest, lambda name: ShardTable.load(folder / name))
