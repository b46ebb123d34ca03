"""What a training consists of before its first step."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.attention.backends import choose_backend
from bd3_scale.checkpoint.folder import remove_partial
from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.checkpoint.source_ids import keep_source_ids, source_ids
from bd3_scale.data.cache import NodeCache
from bd3_scale.data.chat import CHAT_TEMPLATE, template_file
from bd3_scale.data.manifest import Manifest, check_tokenizer, data_hash
from bd3_scale.data.mixture import check_epochs
from bd3_scale.data.node import load_sources_of_node
from bd3_scale.data.order import DataOrder
from bd3_scale.data.pipeline import PipelineBatches
from bd3_scale.data.stream import TrainingStream, new_order, open_sources
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from bd3_scale.diffusion.interval import LEAST_SEQUENCES
from bd3_scale.objective import Objective, objective_of
from bd3_scale.observe.environment import has_fast_bf16
from bd3_scale.parallel.collective import gather_values
from bd3_scale.parallel.engine import TrainingEngine, open_engine
from bd3_scale.parallel.groups import ProcessGroups, group_of_pipeline, local_device, process_groups
from bd3_scale.recipe.checks import check_against_data
from bd3_scale.recipe.load import recipe_hash, resolved_yaml
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.files import check_writable, remove_partial_files, write_atomically
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.runlock import lock_run
from bd3_scale.resilience.secret import SECRET_FILE
from bd3_scale.resilience.signals import StopRequest, interrupt_ends_process
from bd3_scale.resilience.terminal import tell
from bd3_scale.train.inputs import InputsAhead, waited_for
from bd3_scale.train.resume import DATA_FILE, Start
from bd3_scale.train.state import TrainState
from bd3_scale.train.tiles import settle_tiles


@dataclass(frozen=True)
class Run:
    """What the parts of one training share on a rank."""

    recipe: Recipe
    data: Manifest
    data_hash: str
    groups: ProcessGroups
    pipeline: PipelineBatches
    folder: Path
    heartbeat: Heartbeat
    stop: StopRequest

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def objective(self) -> Objective:
        """Return what the model is trained for."""
        return objective_of(self.recipe.diffusion, self.data.vocabulary)


@dataclass(frozen=True)
class Training:
    """A run's model with its optimiser and its data, and how far they have come."""

    run: Run
    engine: TrainingEngine
    stream: TrainingStream
    inputs: InputsAhead
    state: TrainState

    def keys_of(self, step: int) -> dict[str, Any]:
        """Return what the sequences of step `step` and their noise are drawn from."""
        found, names = self.stream.batch_at(step - 1), list(self.run.recipe.data.by_source)
        drawn: dict[str, Any] = {"epoch": int(found.epochs[0])}
        if self.run.recipe.data.sources:
            drawn = {"epochs": found.epochs.tolist(), "sources": [names[source] for source in found.sources]}
        intervals = dict(self.state.intervals)
        return {"seed": self.run.recipe.seed, **drawn, "sample_ids": found.ids.tolist(), "intervals": intervals}

    def data_gauges(self, waited: float) -> dict[str, float]:
        """Return what the data cost: for how many seconds the batch of the last step was `waited` for, and from a
        remote how often each shard has come to this node.
        """
        downloads = self.stream.downloads_per_shard
        found = {} if downloads is None else {"data/downloads_per_shard": downloads}
        return found | {"data/wait_seconds": waited}


def open_run(recipe: Recipe, stack: ExitStack, heartbeat: Heartbeat) -> Run:
    """Meet the other ranks, agree with them on recipe and data, and check that these fit together (collective).

    heartbeat: of this process, which tells from here on when it waits for data.

    Raises:
        ValueError, OSError: they do not, or the data cannot be read.
    """
    recipe = _with_precision(recipe)
    _set_deterministic(recipe.deterministic)
    # Nothing could be saved before ranks have met, and while they wait for each other they hear no handler.
    secret = recipe.run_path / SECRET_FILE
    patience = recipe.data.retry_minutes if recipe.data.remotes else 0
    with interrupt_ends_process():
        groups = stack.enter_context(
            process_groups(recipe.parallel, agree=_agreed(recipe), secret_file=secret, data_minutes=patience)
        )
    with heartbeat.during("data"):
        data = load_sources_of_node(recipe.data)
    pipeline = PipelineBatches(group_of_pipeline(groups))
    run = Run(recipe, data, data_hash(data), groups, pipeline, recipe.run_path, heartbeat, StopRequest())
    _check_against_data(run)
    return run


def open_training(run: Run, start: Start | None, order: DataOrder | None = None) -> Training:
    """Return the model, its optimiser and the stream of its data, from `start` on or from the seed (collective).

    order: of the data of a run that has begun, where no `start` says it.
    ValueError: `data.cache_limit` is too small; whatever parts of it raise.
    """
    recipe, vocabulary = run.recipe, start.manifest.vocabulary if start else run.data.vocabulary
    state = TrainState.at(start)
    state.order = settle_order(run, state.order or order)
    state.tiles = settle_tiles(recipe, backend_of(run), _dtype(recipe), state.tiles)
    engine = open_engine(recipe, vocabulary, run.groups, device=local_device(), seed=recipe.seed)
    if start is not None:
        start.load(engine.zero, engine.layouts)
    stream = TrainingStream(
        recipe.data,
        run.data,
        global_batch_size=recipe.train.global_batch_size,
        dp_rank=run.groups.dp.rank(),
        dp_size=run.groups.dp.size(),
        seed=recipe.seed,
        step=state.step,
        order=state.order,
        reads=run.pipeline.reads,
    )
    batches = run.pipeline.shared(waited_for(stream, run.heartbeat, run.stop))
    inputs = InputsAhead(run.objective, recipe, batches, run.groups, state)
    return Training(run, engine, stream, inputs, state)


def settle_order(run: Run, kept: DataOrder | None) -> DataOrder:
    """Return how the run orders its data: as it was `kept`, else as a new one does; say what that needs of a cache
    (collective).

    ValueError: `data.cache_limit` is less, or a source would be seen more often than it may.
    """
    data, batch, rank = run.recipe.data, run.recipe.train.global_batch_size, run.groups.dp.rank()
    shards = open_sources(data, run.data, "train")
    order = kept or new_order(data, shards.values(), batch)
    check_epochs(data, {name: own.samples_per_shard for name, own in shards.items()}, batch, run.recipe.train.steps)
    machines: dict[int, set[int]] = defaultdict(set)
    for machine, dp_rank, reads in gather_values([_machine(), rank, run.pipeline.reads]):
        if reads:
            machines[machine].add(dp_rank)
    for name, recipe in data.by_source.items():
        if recipe.remote is None or not data.shuffle or order.shuffle_window is None:
            continue
        cache = NodeCache.of_fullest(shards[name].sizes, batch, machines.values(), run.groups.dp.size())
        if data.cache_limit is not None:
            cache.check(data.cache_limit, order.shuffle_window, may_change=kept is None)
        if dist.get_rank() == 0:
            tell(f"data: {cache.told(order.shuffle_window)} of {recipe.remote}")
    return order


def _machine() -> int:
    """Return the number of this rank's machine, where launchers give each as many ranks."""
    return dist.get_rank() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def backend_of(run: Run) -> str:
    """Return the attention that this run takes here. ValueError: it cannot run."""
    recipe = run.recipe
    return choose_backend(recipe.attention_backend, local_device(), _dtype(recipe), recipe.model.head_size)


def lock_run_directory(run: Run, stack: ExitStack) -> None:
    """Keep others out of the run directory until `stack` closes, and remove what a killed save left; on rank 0."""
    check_writable(run.folder)
    stack.enter_context(lock_run(run.folder))
    run.checkpoints.mkdir(exist_ok=True)
    remove_partial(run.checkpoints)
    remove_partial_files(run.folder)


def describe_run(run: Run, start: Start | None) -> None:
    """Write recipe, tokeniser and what the data say of themselves into the run directory; on rank 0."""
    write_atomically(run.folder / "recipe.yaml", resolved_yaml(run.recipe))
    write_atomically(run.folder / DATA_FILE, run.data.model_dump_json(indent=2) + "\n")
    write_atomically(run.folder / "recipe.sha256", recipe_hash(run.recipe) + "\n")
    prepared = run.recipe.data.first_source.path
    tokenizer = load_tokenizer(prepared)
    check_tokenizer(run.data, tokenizer)
    shutil.rmtree(run.folder / TOKENIZER, ignore_errors=True)
    if start is not None and (start.checkpoint / TOKENIZER).is_dir():
        # The same tokeniser, with what an imported one has beside it, such as a chat template.
        beside = start.checkpoint / TOKENIZER
        write_tokenizer(load_tokenizer(beside), beside, run.folder / TOKENIZER)
        keep_source_ids(source_ids(start.checkpoint), run.folder / TOKENIZER)
    else:
        write_tokenizer(tokenizer, Path(prepared), run.folder / TOKENIZER)
    for source in run.recipe.data.by_source.values():
        # What conversations were written by, which is what the model learns, whatever the training begins with has.
        if (template := template_file(Path(source.path))) is not None:
            (run.folder / TOKENIZER / CHAT_TEMPLATE).write_bytes(template.encode())
            break


def _agreed(recipe: Recipe) -> str:
    """Return what must be the same on all ranks: all but where a node keeps its cache of remote data."""
    data = recipe.data
    sources = tuple(s.model_copy(update={"path": "cache"}) if s.remote else s for s in data.sources)
    path = "cache" if data.remote else data.path
    return recipe_hash(recipe.model_copy(update={"data": data.model_copy(update={"path": path, "sources": sources})}))


def _with_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with `auto` decided: what is stored says how the run was computed."""
    if recipe.train.precision != "auto":
        return recipe
    precision = "bf16" if has_fast_bf16() else "fp32"
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def _set_deterministic(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # It would fill every new tensor with NaN, to make reads of uninitialised memory repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_against_data(run: Run) -> None:
    """Check that all ranks see the same data, and that the recipe, which the launcher has checked, fits them."""
    check_against_data(run.recipe, dist.get_world_size(), run.data.document_multiple)
    check_held_out(run.recipe, run.data)
    seen = gather_values(run.data_hash)
    different = [rank for rank, its_hash in enumerate(seen) if its_hash != seen[0]]
    if different:
        raise ValueError(f"ranks {different} see other data in {_paths(run.recipe)} than rank 0")


def check_held_out(recipe: Recipe, data: Manifest) -> None:
    """Raise ValueError where the held-out split is missing or too small for the recipe's evaluations."""
    if recipe.evaluation.every_steps and data.validation is None:
        raise ValueError(
            f"evaluation.every_steps is {recipe.evaluation.every_steps}, {_paths(recipe)} has no held-out split: "
            "set it to 0, or prepare the data with --holdout"
        )
    held_out = min(recipe.evaluation.sequences, data.validation.sequences if data.validation is not None else 0)
    if recipe.diffusion.search_interval and held_out < LEAST_SEQUENCES:
        raise ValueError(
            f"diffusion.search_interval needs {LEAST_SEQUENCES} held-out sequences and has {held_out}: raise "
            "evaluation.sequences, or prepare the data with a larger --holdout"
        )


def _paths(recipe: Recipe) -> str:
    return ", ".join(source.path for source in recipe.data.by_source.values())
