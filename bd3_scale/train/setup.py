"""Open a run: process groups, data, model, optimiser, and the run directory."""

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
from bd3_scale.train.inputs import InputsAhead, with_heartbeat
from bd3_scale.train.resume import DATA_FILE, Start
from bd3_scale.train.state import TrainState
from bd3_scale.train.tiles import resolve_tiles


@dataclass(frozen=True)
class Run:
    """The context that all parts of a training share on a rank."""

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
        """Return the training objective."""
        return objective_of(self.recipe.diffusion, self.data.vocabulary)


@dataclass(frozen=True)
class Training:
    """A run with its model, optimiser, data and progress."""

    run: Run
    engine: TrainingEngine
    stream: TrainingStream
    inputs: InputsAhead
    state: TrainState

    def keys_of(self, step: int) -> dict[str, Any]:
        """Return the keys from which the sequences of step `step` and their noise are drawn."""
        batch, names = self.stream.batch_at(step - 1), list(self.run.recipe.data.by_source)
        drawn: dict[str, Any] = {"epoch": int(batch.epochs[0])}
        if self.run.recipe.data.sources:
            drawn = {"epochs": batch.epochs.tolist(), "sources": [names[source] for source in batch.sources]}
        intervals = dict(self.state.intervals)
        return {"seed": self.run.recipe.seed, **drawn, "sample_ids": batch.ids.tolist(), "intervals": intervals}

    def data_gauges(self, waited: float) -> dict[str, float]:
        """Return the metrics of the data.

        They are the seconds that the last step `waited` for its batch, and, with a remote, how often each shard has
        been downloaded to this node.
        """
        downloads = self.stream.downloads_per_shard
        remote = {} if downloads is None else {"data/downloads_per_shard": downloads}
        return remote | {"data/wait_seconds": waited}


def open_run(recipe: Recipe, stack: ExitStack, heartbeat: Heartbeat) -> Run:
    """Connect the ranks, agree on recipe and data, and check that these fit together (collective).

    heartbeat: of this process; from here on it reports waits for data.

    Raises:
        ValueError, OSError: they do not, or the data cannot be read.
    """
    recipe = _with_precision(recipe)
    _set_deterministic(recipe.deterministic)
    # Before the ranks are connected there is nothing to save, and no Python signal handler runs while they wait in C
    # code: a signal simply ends the process.
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
    """Return model, optimiser and data stream, loaded from `start` or initialised from the seed (collective).

    order: of the data, for a run that has begun and has no `start`.
    ValueError: `data.cache_limit` is too small; whatever parts of it raise.
    """
    recipe, vocabulary = run.recipe, start.manifest.vocabulary if start else run.data.vocabulary
    state = TrainState.at(start)
    state.order = resolve_order(run, state.order or order)
    state.tiles = resolve_tiles(recipe, backend_of(run), _dtype(recipe), state.tiles)
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
    batches = run.pipeline.shared(with_heartbeat(stream, run.heartbeat, run.stop))
    inputs = InputsAhead(run.objective, recipe, batches, run.groups, state)
    return Training(run, engine, stream, inputs, state)


def resolve_order(run: Run, kept: DataOrder | None) -> DataOrder:
    """Return the order of the data: the `kept` one, else that of a new run; print the cache that it needs (collective).

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
            tell(f"data: {cache.describe(order.shuffle_window)} of {recipe.remote}")
    return order


def _machine() -> int:
    """Return the number of this rank's machine; launchers give each machine the same number of ranks."""
    return dist.get_rank() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def backend_of(run: Run) -> str:
    """Return the attention backend of this run. ValueError: it cannot run here."""
    recipe = run.recipe
    return choose_backend(recipe.attention_backend, local_device(), _dtype(recipe), recipe.model.head_size)


def lock_run_directory(run: Run, stack: ExitStack) -> None:
    """Lock the run directory until `stack` closes, and remove the remains of a killed save; on rank 0."""
    check_writable(run.folder)
    stack.enter_context(lock_run(run.folder))
    run.checkpoints.mkdir(exist_ok=True)
    remove_partial(run.checkpoints)
    remove_partial_files(run.folder)


def describe_run(run: Run, start: Start | None) -> None:
    """Write recipe, tokeniser and the manifest of the data into the run directory; on rank 0."""
    write_atomically(run.folder / "recipe.yaml", resolved_yaml(run.recipe))
    write_atomically(run.folder / DATA_FILE, run.data.model_dump_json(indent=2) + "\n")
    write_atomically(run.folder / "recipe.sha256", recipe_hash(run.recipe) + "\n")
    prepared = run.recipe.data.first_source.path
    tokenizer = load_tokenizer(prepared)
    check_tokenizer(run.data, tokenizer)
    shutil.rmtree(run.folder / TOKENIZER, ignore_errors=True)
    if start is not None and (start.checkpoint / TOKENIZER).is_dir():
        # The same tokeniser, with the further files of an imported one, such as a chat template.
        folder = start.checkpoint / TOKENIZER
        write_tokenizer(load_tokenizer(folder), folder, run.folder / TOKENIZER)
        keep_source_ids(source_ids(start.checkpoint), run.folder / TOKENIZER)
    else:
        write_tokenizer(tokenizer, Path(prepared), run.folder / TOKENIZER)
    for source in run.recipe.data.by_source.values():
        # The template that the training conversations were written with: the model learns this one, not that of the
        # checkpoint it begins with.
        if (template := template_file(Path(source.path))) is not None:
            (run.folder / TOKENIZER / CHAT_TEMPLATE).write_bytes(template.encode())
            break


def _agreed(recipe: Recipe) -> str:
    """Return the part of the recipe that must be the same on all ranks: all but the path of a node's cache."""
    data = recipe.data
    sources = tuple(s.model_copy(update={"path": "cache"}) if s.remote else s for s in data.sources)
    path = "cache" if data.remote else data.path
    return recipe_hash(recipe.model_copy(update={"data": data.model_copy(update={"path": path, "sources": sources})}))


def _with_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with `auto` resolved, so that checkpoints record the precision of the run."""
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
    # Otherwise PyTorch fills every new tensor with NaN, which takes time (torch.utils.deterministic).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_against_data(run: Run) -> None:
    """Check that all ranks see the same data, and that the recipe fits them."""
    check_against_data(run.recipe, dist.get_world_size(), run.data.document_multiple)
    check_held_out(run.recipe, run.data)
    seen = gather_values(run.data_hash)
    different = [rank for rank, seen_hash in enumerate(seen) if seen_hash != seen[0]]
    if different:
        raise ValueError(f"ranks {different} see other data in {_paths(run.recipe)} than rank 0")


def check_held_out(recipe: Recipe, data: Manifest) -> None:
    """Raise ValueError if the held-out split is missing or too small for the recipe's evaluations and prompts."""
    if recipe.evaluation.every_steps and data.validation is None:
        raise ValueError(
            f"evaluation.every_steps is {recipe.evaluation.every_steps}, {_paths(recipe)} has no held-out split: "
            "set it to 0, or prepare the data with --holdout"
        )
    if recipe.evaluation.prompts and data.validation is None:
        raise ValueError(
            f"evaluation.prompts are continued at evaluations, and {_paths(recipe)} has no held-out split to evaluate "
            "on: leave them out, or prepare the data with --holdout"
        )
    held_out = min(recipe.evaluation.sequences, data.validation.sequences if data.validation is not None else 0)
    if recipe.diffusion.search_interval and held_out < LEAST_SEQUENCES:
        raise ValueError(
            f"diffusion.search_interval needs {LEAST_SEQUENCES} held-out sequences and has {held_out}: raise "
            "evaluation.sequences, or prepare the data with a larger --holdout"
        )


def _paths(recipe: Recipe) -> str:
    return ", ".join(source.path for source in recipe.data.by_source.values())
