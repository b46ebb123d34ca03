"""Train a model: open the run, take the steps, evaluate and save in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import torch.distributed as dist

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.saver import CheckpointSaver, Saved
from bd3_scale.checkpoint.store import boxes_to_save
from bd3_scale.data.manifest import data_hash
from bd3_scale.observe.loggers.run import check_loggers
from bd3_scale.observe.metrics import METRICS_FILE, has_evaluation
from bd3_scale.parallel.collective import any_rank, gather_values, largest, on_rank_zero
from bd3_scale.parallel.replicas import ReplicasDifferError, check_replicas
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience import faults
from bd3_scale.resilience.files import check_writable
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.resilience.terminal import tell
from bd3_scale.train.attempt import record_attempt
from bd3_scale.train.evaluation import evaluate
from bd3_scale.train.garbage import scheduled_garbage_collection
from bd3_scale.train.guard import Guard
from bd3_scale.train.profiler import StepProfiler
from bd3_scale.train.report import Report
from bd3_scale.train.resume import Start, find_start
from bd3_scale.train.samples import check_prompts
from bd3_scale.train.setup import Run, Training, backend_of, describe_run, lock_run_directory, open_run, open_training
from bd3_scale.train.step import take_step


def train(recipe: Recipe, heartbeat: Heartbeat) -> None:
    """Train, or go on training, the run of `recipe` on all ranks of the launcher (collective).

    A run directory with checkpoints is resumed from the newest undamaged one. SIGTERM, SIGUSR1, SIGINT and SIGHUP make
    all ranks save at one agreed step and return.

    Raises:
        ValueError: recipe, data and checkpoint do not fit together, or replicas differ; OSError: a file cannot be read
        or written; FloatingPointError: loss or gradients are no longer finite.
    """
    with ExitStack() as stack:
        run = open_run(recipe, stack, heartbeat)
        on_rank_zero(partial(check_loggers, recipe.logging))
        stack.enter_context(run.stop)
        backend = backend_of(run)
        start = _take_run_directory(run, stack)
        record_attempt(run, start.step if start else 0)
        training = open_training(run, start)
        on_rank_zero(partial(check_writable, run.checkpoints, _checkpoint_bytes(training)))
        heartbeat.resumed(training.state.step)
        report = stack.enter_context(_report(training, backend))
        guard = Guard(run.folder, run.recipe.guard, step=training.state.step)
        _report_changes(training, start, guard, report)
        saver = CheckpointSaver(run.checkpoints, run.folder / TOKENIZER, run.recipe.checkpoint)
        say = report.warn if dist.get_rank() == 0 else tell
        profiler = stack.enter_context(StepProfiler(run.recipe.train.profile, run.folder, say))
        collect_garbage = stack.enter_context(scheduled_garbage_collection())
        try:
            stopped = _take_steps(training, guard, saver, heartbeat, report, profiler, collect_garbage)
        except (FloatingPointError, ReplicasDifferError):
            # All ranks raise these errors at the same step, so a save that is under way can finish.
            with heartbeat.during("checkpoint"):
                _report_saves(saver, heartbeat, report, wait=True)
            raise
        # A run that was killed between its last checkpoint and this evaluation makes up for it.
        if not stopped and run.data.validation is not None and not _is_evaluated(run):
            _evaluate(training, heartbeat, report)
        heartbeat.end("stopped" if stopped else "done")


def _take_run_directory(run: Run, stack: ExitStack) -> Start | None:
    """Lock the run directory, describe the run in it, and return the checkpoint that it starts from."""
    on_rank_zero(lambda: lock_run_directory(run, stack))
    faults.arm(run.folder)
    faults.reach("start")
    start = find_start(run.recipe, run.checkpoints, run.data)
    on_rank_zero(lambda: describe_run(run, start))
    on_rank_zero(lambda: check_prompts(run))
    return start


def _report(training: Training, backend: str) -> Report:
    run, optimizer = training.run, training.engine.optimizer_name
    return Report(run.folder, run.recipe, training.state.step, attention_backend=backend, optimizer=optimizer)


def _report_changes(training: Training, start: Start | None, guard: Guard, report: Report) -> None:
    """Report which options changed since the checkpoint."""
    run, step = training.run, training.state.step
    if start is not None and (notes := start.notes(run.recipe, run.data)):
        guard.resumed(step, start.changes(run.recipe), notes)
        for note in notes:
            report.warn(f"from step {step} on: {note}")


def _take_steps(
    training: Training,
    guard: Guard,
    saver: CheckpointSaver,
    heartbeat: Heartbeat,
    report: Report,
    profiler: StepProfiler,
    collect_garbage: Callable[[int], None],
) -> bool:
    """Take the remaining steps; return whether a signal ended them early."""
    run, state, steps = training.run, training.state, training.run.recipe.train.steps
    stop = run.stop
    # The inputs of the first step, as each step makes those of the next one: a rank whose data fail must say so before
    # the others wait in a collective of the step.
    training.inputs.make_ahead()
    if any_rank(training.inputs.given_up):
        report.record_stop(state.step, stop.signal)
        return True
    for step in range(state.step + 1, steps + 1):
        # At the beginning of the next step, not at the end of its own: the checkpoint of a step is saved before its
        # evaluation, and a run that resumes from it evaluates here.
        if run.recipe.evaluates_at(state.step):
            _evaluate(training, heartbeat, report)
        profiler.before(step)
        began = time.monotonic()
        saving = saver.in_flight
        result = take_step(training)
        took = time.monotonic() - began
        profiler.after(step)
        collect_garbage(step)
        state.finish_step(result)
        heartbeat.finished(step)
        faults.reach("collective", step=step)
        stopping, waited = largest(stop.signal is not None, training.inputs.waited)
        report.record_step(step, result, took, saving=saving, gauges=partial(training.data_gauges, waited))
        if warning := guard.check(step, result, partial(training.keys_of, step)):
            report.warn(warning)
        final = bool(stopping) or step == steps
        saves = final or _due(step, run.recipe.checkpoint.every_steps)
        # Also before a save: replicas that have drifted apart must not replace a sound checkpoint.
        if (compares := run.recipe.guard.replicas_every_steps) and (saves or _due(step, compares)):
            check_replicas(training.engine.chunks, training.engine.layouts, run.groups, step)
        if saves:
            with heartbeat.during("checkpoint"):
                saver.begin(_manifest(training), boxes_to_save(training.engine.zero, training.engine.layouts))
        with heartbeat.during("checkpoint") if final else nullcontext():
            last = _report_saves(saver, heartbeat, report, wait=final)
        if final and last is not None and last.error is not None:
            raise last.error
        if seconds := saver.overdue():
            report.warn(f"step {step}: the last checkpoint is being written since {seconds:.0f} s")
        if stopping and step < steps:
            report.record_stop(step, stop.signal)
            return True
    return False


def _report_saves(saver: CheckpointSaver, heartbeat: Heartbeat, report: Report, *, wait: bool) -> Saved | None:
    """Report the saves that have ended; return the last of them."""
    last = None
    for last in saver.ended(wait=wait):
        report.record_save(last)
        if last.error is None:
            heartbeat.saved(last.step)
    return last


def _is_evaluated(run: Run) -> bool:
    """Return whether the last evaluation is recorded."""
    return on_rank_zero(lambda: has_evaluation(run.folder / METRICS_FILE, run.recipe.train.steps))


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _checkpoint_bytes(training: Training) -> int:
    """Return the size of a checkpoint: the full tensors of all stages in fp32, for each state (collective)."""
    mine = {piece.key: math.prod(piece.full_shape) for layout in training.engine.layouts for piece in layout.pieces}
    full = {key: size for stage in gather_values(mine, training.run.groups.pp) for key, size in stage.items()}
    return 4 * sum(full.values()) * len(training.engine.zero.names)


def _manifest(training: Training) -> CheckpointManifest:
    run, engine, state = training.run, training.engine, training.state
    assert engine.zero.step == state.step - state.skipped
    return CheckpointManifest.of_run(
        run.recipe,
        step=state.step,
        skipped=state.skipped,
        vocabulary=engine.chunks[0].vocabulary,
        data_hash=data_hash(run.data, run.recipe.data.used_before(state.step)),
        world_size=dist.get_world_size(),
        states=engine.zero.names,
        attention_tiles=dict(state.tiles),
        intervals=dict(state.intervals),
        data_order=state.order,
        ema_warms_up="ema" in engine.zero.names,
    )


def _evaluate(training: Training, heartbeat: Heartbeat, report: Report) -> None:
    """Evaluate after the finished steps; training continues with the new intervals."""
    state = training.state
    with heartbeat.during("evaluation"):
        faults.reach("evaluation", step=state.step)
        evaluation = evaluate(training, samples=True)
    state.intervals = evaluation.intervals
    report.record_evaluation(state.step, evaluation)
