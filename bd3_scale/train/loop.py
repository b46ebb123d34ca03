"""The way of the data, from a recipe to a trained model."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_scale.attention.kernels.tiles import choices
from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.store import remove_partial, save_checkpoint
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import Manifest, check_tokenizer, load_manifest
from bd3_scale.data.stream import TrainingStream, held_out_batches
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.diffusion.interval import LEAST_SEQUENCES, Interval
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.model.build import attention_backend, build_model
from bd3_scale.model.layout import ParameterLayout, parameter_layouts
from bd3_scale.observe.environment import has_fast_bf16
from bd3_scale.observe.metrics import METRICS_FILE, has_evaluation
from bd3_scale.parallel.collective import any_rank, gather_objects, on_rank_zero
from bd3_scale.parallel.engine import StepResult, TrainingEngine
from bd3_scale.parallel.groups import ProcessGroups, local_device, process_groups
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.load import recipe_hash, resolved_yaml
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.files import check_writable, write_atomically
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.runlock import lock_run
from bd3_scale.resilience.signals import StopRequest, ended_by_signals
from bd3_scale.train.inputs import step_inputs
from bd3_scale.train.learning_rate import learning_rate
from bd3_scale.train.report import Report
from bd3_scale.train.resume import Start, find_start
from bd3_scale.train.tiles import settle_tiles


@dataclass(frozen=True)
class Run:
    """What the parts of one training share on a rank."""

    recipe: Recipe
    data: Manifest
    data_hash: str
    groups: ProcessGroups
    folder: Path
    # Of each block size whose interval was searched; evaluations put it here.
    intervals: dict[int, Interval]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def train(recipe: Recipe, heartbeat: Heartbeat) -> None:
    """Train, or go on training, the run of `recipe` on all ranks of the launcher (collective).

    A run directory with a checkpoint is resumed from its newest one. SIGTERM, SIGUSR1 and SIGINT make all ranks save
    at one agreed step and return.

    Raises:
        ValueError: recipe, data and checkpoint do not fit together; OSError: a file cannot be read or written;
        FloatingPointError: the loss is no longer finite.
    """
    recipe = _with_precision(recipe)
    _set_deterministic(recipe.deterministic)
    with ExitStack() as stack:
        # Nothing could be saved before ranks have met, and while they wait for each other they hear no handler.
        with ended_by_signals():
            groups = stack.enter_context(process_groups(recipe.parallel, agree=_agreed(recipe)))
        stop = stack.enter_context(StopRequest())
        data = load_manifest(recipe.data.path, recipe.data.remote)
        run = Run(recipe, data, _hash(data), groups, recipe.run_path, {})
        _check(run)
        backend = attention_backend(recipe, dtype=_dtype(recipe), device=local_device())
        on_rank_zero(lambda: _lock_run_directory(run, stack))
        start = find_start(recipe, run.checkpoints, data, run.data_hash)
        on_rank_zero(lambda: _describe_run(run, start))
        settle_tiles(recipe, backend, _dtype(recipe), start.manifest if start and start.resumes else None)

        vocabulary = start.manifest.vocabulary if start else data.vocabulary
        chunks = build_model(recipe, vocabulary, groups, dtype=_dtype(recipe), device=local_device(), seed=recipe.seed)
        layouts = parameter_layouts(chunks)
        engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
        size = _checkpoint_bytes(layouts, engine)
        on_rank_zero(lambda: check_writable(run.checkpoints, size))
        if start is not None:
            start.load(engine.zero, layouts)
            run.intervals.update(start.manifest.intervals if start.resumes else {})
        done = start.step if start else 0
        heartbeat.resumed(done)
        report = stack.enter_context(
            Report(run.folder, recipe, done, attention_backend=backend, optimizer=engine.optimizer_name)
        )
        stream = TrainingStream(
            recipe.data,
            data,
            global_batch_size=recipe.train.global_batch_size,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            seed=recipe.seed,
            step=done,
        )
        for step in range(done + 1, recipe.train.steps + 1):
            # Before the next step and not after its own, so that a resumed run meets what a checkpoint came before of.
            if recipe.evaluates_at(step - 1):
                _evaluate(run, engine, step - 1, heartbeat, report)
            began = time.monotonic()
            result = _take_step(run, engine, next(stream), step)
            report.trained(step, result, time.monotonic() - began)
            heartbeat.finished(step)
            stopping = any_rank(stop.signal is not None)
            last = step == recipe.train.steps
            if stopping or last or _due(step, recipe.checkpoint.every_steps):
                with heartbeat.during("checkpoint"):
                    report.saved(step, _save(run, engine, layouts, step))
                heartbeat.saved(step)
            if stopping and not last:
                report.stopped(step, stop.signal)
                heartbeat.end("stopped")
                return
        # A run that was ended between its last checkpoint and this comes back for it.
        if data.validation is not None and not _is_evaluated(run):
            _evaluate(run, engine, recipe.train.steps, heartbeat, report)
        heartbeat.end("done")


def _is_evaluated(run: Run) -> bool:
    """Whether the last evaluation is recorded."""
    return on_rank_zero(lambda: has_evaluation(run.folder / METRICS_FILE, run.recipe.train.steps))


def _take_step(run: Run, engine: TrainingEngine, batch: Batch, step: int) -> StepResult:
    """Noise, forward, backward and update of optimiser step `step`, counted from 1."""
    recipe = run.recipe
    micro_batches = [
        step_inputs(
            recipe,
            micro,
            step - 1,
            intervals=run.intervals,
            mask_id=run.data.vocabulary.mask_id,
            device=local_device(),
            context=(run.groups.cp.rank(), run.groups.cp.size()),
        )
        for micro in batch.split(recipe.train.micro_batch_size)
    ]
    result = engine.step(
        micro_batches,
        tokens=recipe.train.global_batch_size * recipe.data.seq_len,
        lr=learning_rate(step - 1, recipe.train.steps, recipe.optimizer),
        kinds=len(recipe.diffusion.block_sizes_at(step - 1)),
    )
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise FloatingPointError(
            f"step {step} has loss {result.loss} and gradient norm {result.grad_norm}: lower optimizer.lr or lengthen "
            "optimizer.warmup_steps, and run again to go on from the last checkpoint"
        )
    return result


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _agreed(recipe: Recipe) -> str:
    """What must be the same on all ranks: all but where a node keeps its cache of remote data."""
    if recipe.data.remote is None:
        return recipe_hash(recipe)
    return recipe_hash(recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "cache"})}))


def _with_precision(recipe: Recipe) -> Recipe:
    """The recipe with `auto` decided: what is stored says how the run was computed."""
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


def _hash(data: Manifest) -> str:
    return hashlib.sha256(data.model_dump_json().encode()).hexdigest()[:16]


def _check(run: Run) -> None:
    """All ranks agree on recipe and data, and these fit together."""
    recipe, data = run.recipe, run.data
    check_recipe(recipe, dist.get_world_size(), data.document_multiple)
    if recipe.evaluation.every_steps and data.validation is None:
        raise ValueError(
            f"evaluation.every_steps is {recipe.evaluation.every_steps}, {recipe.data.path} has no held-out split: "
            "set it to 0, or prepare the data with --holdout"
        )
    held_out = min(recipe.evaluation.sequences, data.validation.sequences if data.validation is not None else 0)
    if recipe.diffusion.search_interval and held_out < LEAST_SEQUENCES:
        raise ValueError(
            f"diffusion.search_interval needs {LEAST_SEQUENCES} held-out sequences and has {held_out}: raise "
            "evaluation.sequences, or prepare the data with a larger --holdout"
        )
    seen = gather_objects(run.data_hash)
    different = [rank for rank, data_hash in enumerate(seen) if data_hash != seen[0]]
    if different:
        raise ValueError(f"ranks {different} see other data in {recipe.data.path} than rank 0")


def _lock_run_directory(run: Run, stack: ExitStack) -> None:
    check_writable(run.folder)
    stack.enter_context(lock_run(run.folder))
    run.checkpoints.mkdir(exist_ok=True)
    remove_partial(run.checkpoints)


def _describe_run(run: Run, start: Start | None) -> None:
    write_atomically(run.folder / "recipe.yaml", resolved_yaml(run.recipe))
    write_atomically(run.folder / "recipe.sha256", recipe_hash(run.recipe) + "\n")
    tokenizer = load_tokenizer(run.recipe.data.path)
    check_tokenizer(run.data, tokenizer)
    shutil.rmtree(run.folder / TOKENIZER, ignore_errors=True)
    if start is not None and (start.checkpoint / TOKENIZER).is_dir():
        # The same tokeniser, with what an imported one has beside it, such as a chat template.
        shutil.copytree(start.checkpoint / TOKENIZER, run.folder / TOKENIZER)
    else:
        tokenizer.save(run.folder / TOKENIZER)


def _checkpoint_bytes(layouts: list[ParameterLayout], engine: TrainingEngine) -> int:
    """Size of a checkpoint: the full tensors of all stages in fp32, once for each state (collective)."""
    mine = {piece.key: math.prod(piece.full_shape) for layout in layouts for piece in layout.pieces}
    full = {key: size for stage in gather_objects(mine, engine.groups.pp) for key, size in stage.items()}
    return 4 * sum(full.values()) * len(engine.zero.names)


def _evaluate(run: Run, engine: TrainingEngine, step: int, heartbeat: Heartbeat, report: Report) -> None:
    """NELBO of held-out sequences at every block size in use, with the averaged weights where an average is kept.

    Where the recipe says so, the intervals follow what was found.
    """
    diffusion = run.recipe.diffusion
    with heartbeat.during("evaluation"), engine.zero.evaluation_weights():
        found = [
            _held_out(run, engine, block_size)
            for block_size in dict.fromkeys((diffusion.block_size, *diffusion.block_sizes_at(step)))
        ]
    searches = [held_out.intervals() for held_out in found] if diffusion.search_interval else []
    default = (diffusion.mask_rate_low, diffusion.mask_rate_high)
    # Rank 0 decides: ranks of one model must mask alike, whatever their processors make of a last bit.
    followed = on_rank_zero(
        lambda: {s.block_size: s.follow(run.intervals.get(s.block_size, default)) for s in searches}
    )
    run.intervals.update(followed)
    report.evaluated(step, found, searches, run.intervals)


def _held_out(run: Run, engine: TrainingEngine, block_size: int) -> HeldOut:
    recipe = run.recipe
    batches = held_out_batches(
        recipe.data,
        run.data,
        batch_size=recipe.train.micro_batch_size,
        dp_rank=run.groups.dp.rank(),
        dp_size=run.groups.dp.size(),
        sequences=recipe.evaluation.sequences,
    )
    return evaluate_nelbo(
        engine.chunks,
        batches,
        run.groups,
        diffusion=recipe.diffusion.model_copy(update={"block_size": block_size}),
        draws=recipe.evaluation.draws,
    )


def _save(run: Run, engine: TrainingEngine, layouts: list[ParameterLayout], step: int) -> Path:
    assert engine.zero.step == step
    manifest = CheckpointManifest(
        step=step,
        recipe=run.recipe,
        recipe_hash=recipe_hash(run.recipe),
        vocabulary=engine.chunks[0].vocabulary,
        data_hash=run.data_hash,
        world_size=dist.get_world_size(),
        states=engine.zero.names,
        attention_tiles=choices(),
        intervals=run.intervals,
    )
    return save_checkpoint(
        run.checkpoints,
        manifest,
        engine.zero,
        layouts,
        tokenizer=run.folder / TOKENIZER,
        keep_last=run.recipe.checkpoint.keep_last,
    )
