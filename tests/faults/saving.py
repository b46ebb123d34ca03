"""Save a checkpoint again and again in a process that is killed at each system call in turn; see `shim.c`."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import xxhash

from bd3_scale.checkpoint.boxes import Box
from bd3_scale.checkpoint.folder import LATEST, list_checkpoints, remove_partial
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.store import save_boxes
from bd3_scale.checkpoint.verify import check_checkpoint
from bd3_scale.observe.environment import software
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    DiffusionRecipe,
    ModelRecipe,
    ParallelRecipe,
    Recipe,
    TrainRecipe,
)
from bd3_scale.recipe.vocabulary import Vocabulary

RECIPE = Recipe(
    name="tiny",
    model=ModelRecipe(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8),
    diffusion=DiffusionRecipe(block_size=4),
    data=DataRecipe(path="unused", seq_len=8),
    train=TrainRecipe(steps=4, global_batch_size=1, micro_batch_size=1),
)


def manifest_of(
    step: int, recipe: Recipe = RECIPE, size: int = 12, states: tuple[str, ...] = ("master",)
) -> CheckpointManifest:
    """Return a manifest of one process; the vocabulary has `size` ids, the last of which is the mask."""
    vocabulary = Vocabulary(size=size, eos_id=0, mask_id=size - 1)
    return CheckpointManifest.of_run(recipe, step=step, vocabulary=vocabulary, states=states)


def save(folder: Path, step: int) -> Path:
    """Save two tensors that hold their step, in a process group of this process alone."""
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    boxes = [Box(f"master.{name}", torch.full((300,), float(step)), (0,), (300,)) for name in ("a", "b")]
    return save_boxes(folder, manifest_of(step), boxes, tokenizer=tokenizer, keep=CheckpointRecipe(keep_last=1))


def sealed(checkpoint, **changes):
    """Return a changed manifest with a valid hash, as its author could have written it."""
    content = json.loads((checkpoint / "manifest.json").read_text()) | changes
    del content["checksum"]  # it comes last
    text = json.dumps(content | {"checksum": ""}, indent=2)
    return text.replace('"checksum": ""', f'"checksum": "{xxhash.xxh3_128(text.encode()).hexdigest()}"')


def in_child(action, *arguments) -> int:
    """Exit status of a fork of this process that does it; forked before any thread was started."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with process_groups(ParallelRecipe()):
                action(*arguments)
            code = 0
        except OSError as error:
            code = 2 if "older ones are unchanged" in str(error) or error.errno in (errno.ENOSPC, errno.EIO) else 4
        except BaseException as error:  # noqa: BLE001 - a fork must never go on as its parent
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def struck(shim: ctypes.CDLL, folder: Path, call: int, last: int, number: int) -> None:
    shim.shim_arm(str(folder).encode(), call, last, number)
    try:
        save(folder, 2)
    finally:
        calls = shim.shim_count()
        shim.shim_arm(b"", 0, 0, 0)
        (folder.parent / "calls").write_text(str(calls))


def sound(folder: Path) -> list[int]:
    """Return the steps of the sound checkpoints; every one that looks complete must be sound."""
    return [check_checkpoint(path, "full").step for path in list_checkpoints(folder)]


def main() -> None:
    place, kind = Path(sys.argv[1]), sys.argv[2]
    number = {"kill": 0, "full": errno.ENOSPC, "fail": errno.EIO}[kind]
    software()  # asked once a process, and not in every fork
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    shim.shim_count.restype = ctypes.c_long
    pristine = place / "pristine"
    (pristine / "checkpoints").mkdir(parents=True)
    assert in_child(save, pristine / "checkpoints", 1) == 0
    outcomes: list[dict] = []
    call = 0
    while not outcomes or not outcomes[-1]["undisturbed"]:
        call += 1
        run = place / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(pristine, run)
        folder = run / "checkpoints"
        # A disk that is full stays so; a device may fail once.
        last = 1 << 30 if kind == "full" else call
        status = in_child(struck, shim, folder, call, last, number)
        reached = (run / "calls").exists() and int((run / "calls").read_text()) < call
        outcome = {"call": call, "status": status, "undisturbed": reached, "sound": sound(folder)}
        latest = (folder / LATEST).read_text().strip()
        outcome["latest"] = check_checkpoint(folder / latest, "full").step
        remove_partial(folder)
        names = {path.name for path in folder.iterdir()}
        outcome["left"] = sorted(names - {LATEST} - {f"step-{step:08d}" for step in outcome["sound"]})
        outcomes.append(outcome)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
