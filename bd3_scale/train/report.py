"""Report a run: on the console, to its loggers, and as pictures."""

from __future__ import annotations

import json
import math
import signal
import textwrap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.checkpoint.saver import Saved
from bd3_scale.fused.ops import are_disabled
from bd3_scale.observe.environment import peak_cuda_bytes, peak_rss_bytes
from bd3_scale.observe.experts import ExpertLoad, load_metrics
from bd3_scale.observe.flops import peak_flops
from bd3_scale.observe.loggers.base import LoggedRun
from bd3_scale.observe.loggers.run import RunLoggers
from bd3_scale.observe.metrics import METRICS_FILE, SAMPLES_FILE, has_evaluation, truncate_after
from bd3_scale.observe.plot import interval_curve, loss_curve
from bd3_scale.observe.progress import TrainingProgress
from bd3_scale.parallel.engine import StepResult
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.files import Lines
from bd3_scale.train.evaluation import Evaluation

# Of a sample that the console shows; the file has the whole text.
_SHOWN_LETTERS = 100
# By `deterministic` of the recipe; see `attention.kernels.backward`.
_BACKWARD = {
    True: ", deterministic backward of seven products",
    False: ", fused backward of five products, whose sums differ from run to run",
}


class Report:
    """The records of a run, made by rank 0; on other ranks it does nothing. A context manager."""

    def __init__(self, folder: Path, recipe: Recipe, start: int, *, attention_backend: str, optimizer: str) -> None:
        self._folder, self._recipe, self._start = folder, recipe, start
        self._attention, self._optimizer = attention_backend, optimizer
        self._peak = peak_flops(torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
        self._stack = ExitStack()
        self._loggers: RunLoggers | None = None
        self._samples: Lines | None = None
        self._progress: TrainingProgress | None = None
        self._drawable = False
        self._experts = ExpertLoad(folder, recipe.model.dense_layers)
        # Of the last steps: while a checkpoint was written (True), and not.
        self._seconds: dict[bool, deque[float]] = {saving: deque(maxlen=64) for saving in (False, True)}

    def __enter__(self) -> Report:
        if dist.get_rank() == 0:
            self._open_samples()
            self._loggers = self._stack.enter_context(
                RunLoggers(
                    LoggedRun(
                        self._folder,
                        self._recipe.name,
                        self._recipe.model_dump(mode="json"),
                        self._start,
                        self._start < self._recipe.train.steps and self._recipe.evaluates_at(self._start),
                    ),
                    self._recipe.logging,
                )
            )
            self._progress = self._stack.enter_context(
                TrainingProgress(self._recipe.train.steps, first_step=self._start)
            )
            if self._start == self._recipe.train.steps:
                self._say(f"nothing to do: {self._folder} has done its {self._start} steps; train.steps=… goes further")
            else:
                new = f"a new run in {self._folder}"
                if self._recipe.init_from is not None:
                    new += f", from the weights of {self._recipe.init_from}"
                self._say(f"resumed after step {self._start}" if self._start else new)
                # The backward of this backend alone depends on the recipe.
                backward = _BACKWARD[self._recipe.deterministic] * (self._attention == "triton")
                # $BD3_SCALE_FUSED turns the fused kernels off.
                plain = "; between products: plain PyTorch" * are_disabled()
                self._say(f"attention: {self._attention}{backward}{plain}; optimizer: {self._optimizer}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if self._loggers is not None and error is None and self._drawable:
            loss_curve(self._folder / METRICS_FILE, self._folder / "loss.png")
            self._experts.write()
            if self._recipe.diffusion.search_interval:
                interval_curve(self._folder / METRICS_FILE, self._folder / "intervals.png")

    def _open_samples(self) -> None:
        """Drop the texts of steps and evaluations that are taken again, before the metrics forget which these are."""
        path, metrics, recipe = self._folder / SAMPLES_FILE, self._folder / METRICS_FILE, self._recipe
        again = self._start < recipe.train.steps and recipe.evaluates_at(self._start)
        # A killed run may have written texts, and their evaluation not.
        truncate_after(path, self._start - (again or not has_evaluation(metrics, self._start)))
        if recipe.evaluation.prompts:
            self._samples = Lines(path)
            self._stack.callback(self._samples.close)

    def record_step(
        self, step: int, result: StepResult, seconds: float, *, saving: bool, gauges: Callable[[], dict[str, float]]
    ) -> None:
        """Record an optimiser step that took `seconds`.

        saving: a checkpoint was being written meanwhile. gauges: returns further metrics; called if the step is logged.
        """
        self._seconds[saving].append(seconds)
        if self._loggers is None or self._progress is None:
            return
        tokens = self._recipe.train.global_batch_size * self._recipe.data.seq_len
        if result.routed is not None:
            self._experts.add(step, result.routed.numpy())
        if step % self._recipe.logging.every_steps == 0 or step == self._recipe.train.steps:
            self._drawable = True
            cuda = peak_cuda_bytes()
            more = gauges() | ({} if cuda is None else {"memory/peak_cuda_bytes": cuda})
            more |= self._losses_by_group(step, result)
            if result.routed is not None:
                more |= load_metrics(result.routed.numpy(), self._recipe.model.dense_layers)
            if self._peak is not None:
                more["perf/mfu"] = result.flops / seconds / self._peak / dist.get_world_size()
            self._loggers.log(
                step,
                {
                    "train/loss": result.loss,
                    "train/grad_norm": result.grad_norm,
                    "train/lr": result.lr,
                    "train/tokens": step * tokens,
                    "perf/step_seconds": seconds,
                    **{f"perf/{part}_seconds": part_seconds for part, part_seconds in result.seconds.items()},
                    "perf/tokens_per_second": tokens / seconds,
                    "memory/peak_rss_bytes": peak_rss_bytes(),
                    **more,
                },
            )
        self._progress.step(step, train_loss=result.loss, tokens_per_second=tokens / seconds)

    def _losses_by_group(self, step: int, result: StepResult) -> dict[str, float]:
        sizes, sources = self._recipe.diffusion.block_sizes_at(step - 1), list(self._recipe.data.by_source)
        losses: dict[str, float | None] = {}
        if len(self._recipe.diffusion.block_sizes) > 1:
            groups_of = (range(i * len(sources), (i + 1) * len(sources)) for i in range(len(sizes)))
            losses |= {
                f"train/loss_block_{size}": result.loss_of(groups)
                for size, groups in zip(sizes, groups_of, strict=True)
            }
        if len(sources) > 1:
            groups_of = (range(i, len(sources) * len(sizes), len(sources)) for i in range(len(sources)))
            losses |= {
                f"train/loss_source_{name}": result.loss_of(groups)
                for name, groups in zip(sources, groups_of, strict=True)
            }
        return {name: loss for name, loss in losses.items() if loss is not None}

    def record_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation, with whose intervals training continues."""
        if self._loggers is None or self._progress is None:
            return
        self._record_samples(step, evaluation.samples)
        results, searches, intervals = evaluation.held_out, evaluation.searches, evaluation.intervals
        estimate = results[0].nelbo
        more: dict[str, float] = {}
        if len(results) > 1:
            more |= {f"eval/nelbo_block_{result.block_size}": result.nelbo.nelbo for result in results}
        more |= {f"eval/nelbo_source_{name}": source.nelbo for name, source in evaluation.by_source.items()}
        for search in searches:
            low, high = intervals[search.block_size]
            variances = (i.variance for i in search.variances if (i.low, i.high) == (low, high))
            values = {"mask_rate_low": low, "mask_rate_high": high, "loss_variance": next(variances, math.nan)}
            values |= {"loss_variance_unclipped": search.variances[0].variance}
            more |= {f"interval/{key}_block_{search.block_size}": value for key, value in values.items()}
        self._loggers.log(
            step,
            {
                "eval/nelbo": estimate.nelbo,
                "eval/nelbo_text_standard_error": estimate.text_standard_error,
                "eval/nelbo_noise_standard_error": estimate.noise_standard_error,
                "eval/perplexity": estimate.perplexity,
                **more,
            },
        )
        self._progress.evaluated(estimate.nelbo)
        self._say(
            f"step {step}: held-out NELBO {estimate.nelbo:.4f} nats a token, perplexity {estimate.perplexity:.2f}"
        )
        if evaluation.by_source:
            by_source = ", ".join(f"{name} {source.nelbo:.4f}" for name, source in evaluation.by_source.items())
            self._say(f"step {step}: by source {by_source}")
        for search in searches:
            low, high = intervals[search.block_size]
            self._say(f"step {step}: blocks of {search.block_size} continue with mask rates {low:.2f} to {high:.2f}")

    def _record_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write the texts of an evaluation to their file, to the loggers, and their beginnings to the console."""
        if self._samples is None or self._loggers is None:
            return
        for number, sample in enumerate(samples):
            self._samples.write(json.dumps(sample))
            self._loggers.log_text(step, f"samples/{number}", sample["prompt"] + sample["text"])
            shown = textwrap.shorten(f"{sample['prompt']}|{sample['text']}", _SHOWN_LETTERS, placeholder=" …")
            self._say(f"step {step}: sample {shown}")

    def record_save(self, saved: Saved) -> None:
        """Record a save that has ended, with a checkpoint or without."""
        if self._loggers is None:
            return
        during, otherwise = self._seconds[True], self._seconds[False]
        slowdown = median(during) / median(otherwise) - 1 if during and otherwise else None
        during.clear()
        if saved.checkpoint is None:
            self._say(f"step {saved.step}: NOT SAVED after {saved.tries} tries: {saved.error}")
        else:
            again = f" at try {saved.tries}" * (saved.tries > 1)
            self._say(f"step {saved.step}: saved {saved.checkpoint}{again}")
        self._loggers.log(
            saved.step,
            {
                "checkpoint/tries": saved.tries,
                "checkpoint/failed": int(saved.checkpoint is None),
                "checkpoint/blocked_seconds": saved.blocked,
                "checkpoint/seconds": saved.seconds,
                "checkpoint/slowdown": slowdown,
            },
        )

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._say(text)

    def record_stop(self, step: int, by: signal.Signals | None) -> None:
        """Report that the run has saved and stops by a signal."""
        name = "a signal to another rank" if by is None else by.name
        self._say(f"stopped after step {step} by {name}: the same command continues from here")

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.message(text)
