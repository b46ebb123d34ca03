"""What a run tells people: on the console, in `metrics.jsonl` and Weights & Biases, and as a picture."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType

import torch
import torch.distributed as dist

from bd3_scale.checkpoint.saver import Saved
from bd3_scale.fused.ops import are_kept_away
from bd3_scale.observe.environment import peak_cuda_bytes, peak_rss_bytes
from bd3_scale.observe.experts import ExpertLoad, load_metrics
from bd3_scale.observe.flops import peak_flops
from bd3_scale.observe.metrics import METRICS_FILE, MetricsWriter
from bd3_scale.observe.plot import interval_curve, loss_curve
from bd3_scale.observe.progress import TrainingProgress
from bd3_scale.parallel.engine import StepResult
from bd3_scale.recipe.schema import Recipe
from bd3_scale.train.evaluation import Evaluation

# By `deterministic`: see `attention.kernels.backward`.
_BACKWARD = {
    True: ", deterministic backward of seven products",
    False: ", fused backward of five products, whose sums differ from run to run",
}


class Report:
    """Rank 0's records of a run; on other ranks it does nothing. A context manager."""

    def __init__(self, folder: Path, recipe: Recipe, start: int, *, attention_backend: str, optimizer: str) -> None:
        self._folder, self._recipe, self._start = folder, recipe, start
        self._attention, self._optimizer = attention_backend, optimizer
        self._peak = peak_flops(torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
        self._stack = ExitStack()
        self._metrics: MetricsWriter | None = None
        self._progress: TrainingProgress | None = None
        self._drawable = False
        self._experts = ExpertLoad(folder, recipe.model.dense_layers)
        # Of the last steps, without and beside a save.
        self._seconds: dict[bool, deque[float]] = {saving: deque(maxlen=64) for saving in (False, True)}

    def __enter__(self) -> Report:
        if dist.get_rank() == 0:
            self._metrics = self._stack.enter_context(
                MetricsWriter(
                    self._folder,
                    self._recipe.logging.wandb,
                    after_step=self._start,
                    evaluates_again=self._start < self._recipe.train.steps and self._recipe.evaluates_at(self._start),
                    name=self._recipe.name,
                    config=self._recipe.model_dump(mode="json"),
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
                # The one backend whose backward depends on the recipe.
                backward = _BACKWARD[self._recipe.deterministic] * (self._attention == "triton")
                # A person's wish, which on a GPU takes the place of the kernels.
                plain = "; between products: plain PyTorch" * are_kept_away()
                self._say(f"attention: {self._attention}{backward}{plain}; optimizer: {self._optimizer}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if self._metrics is not None and error is None and self._drawable:
            loss_curve(self._folder / METRICS_FILE, self._folder / "loss.png")
            self._experts.write()
            if self._recipe.diffusion.search_interval:
                interval_curve(self._folder / METRICS_FILE, self._folder / "intervals.png")

    def trained(
        self, step: int, result: StepResult, seconds: float, *, saving: bool, gauges: Callable[[], dict[str, float]]
    ) -> None:
        """After an optimiser step that took `seconds`; `saving`: beside a checkpoint that was being written; `gauges`:
        give what else is recorded.
        """
        self._seconds[saving].append(seconds)
        if self._metrics is None or self._progress is None:
            return
        tokens = self._recipe.train.global_batch_size * self._recipe.data.seq_len
        if result.routed is not None:
            self._experts.add(step, result.routed.numpy())
        if step % self._recipe.logging.every_steps == 0 or step == self._recipe.train.steps:
            self._drawable = True
            cuda = peak_cuda_bytes()
            more = gauges() | ({} if cuda is None else {"memory/peak_cuda_bytes": cuda})
            more |= self._losses_by_kind(step, result)
            if result.routed is not None:
                more |= load_metrics(result.routed.numpy(), self._recipe.model.dense_layers)
            if self._peak is not None:
                more["perf/mfu"] = result.flops / seconds / self._peak / dist.get_world_size()
            self._metrics.write(
                step,
                {
                    "train/loss": result.loss,
                    "train/grad_norm": result.grad_norm,
                    "train/lr": result.lr,
                    "train/tokens": step * tokens,
                    "perf/tokens_per_second": tokens / seconds,
                    "memory/peak_rss_bytes": peak_rss_bytes(),
                    **more,
                },
            )
        self._progress.step(step, train_loss=result.loss, tokens_per_second=tokens / seconds)

    def _losses_by_kind(self, step: int, result: StepResult) -> dict[str, float]:
        sizes, sources = self._recipe.diffusion.block_sizes_at(step - 1), list(self._recipe.data.by_source)
        found: dict[str, float | None] = {}
        if len(self._recipe.diffusion.block_sizes) > 1:
            groups_of = (range(i * len(sources), (i + 1) * len(sources)) for i in range(len(sizes)))
            found |= {
                f"train/loss_block_{size}": result.loss_of(groups)
                for size, groups in zip(sizes, groups_of, strict=True)
            }
        if len(sources) > 1:
            groups_of = (range(i, len(sources) * len(sizes), len(sources)) for i in range(len(sources)))
            found |= {
                f"train/loss_source_{name}": result.loss_of(groups)
                for name, groups in zip(sources, groups_of, strict=True)
            }
        return {name: loss for name, loss in found.items() if loss is not None}

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """After an evaluation on held-out sequences, whose intervals training goes on with."""
        if self._metrics is None or self._progress is None:
            return
        found, searches, intervals = evaluation.held_out, evaluation.searches, evaluation.intervals
        estimate = found[0].nelbo
        more: dict[str, float] = {}
        if len(found) > 1:
            more |= {f"eval/nelbo_block_{held_out.block_size}": held_out.nelbo.nelbo for held_out in found}
        more |= {f"eval/nelbo_source_{name}": its.nelbo for name, its in evaluation.by_source.items()}
        for search in searches:
            low, high = intervals[search.block_size]
            told = (i.variance for i in search.variances if (i.low, i.high) == (low, high))
            values = {"mask_rate_low": low, "mask_rate_high": high, "loss_variance": next(told, math.nan)}
            values |= {"loss_variance_unclipped": search.variances[0].variance}
            more |= {f"interval/{key}_block_{search.block_size}": value for key, value in values.items()}
        self._metrics.write(
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
            of_each = ", ".join(f"{name} {its.nelbo:.4f}" for name, its in evaluation.by_source.items())
            self._say(f"step {step}: by source {of_each}")
        for search in searches:
            low, high = intervals[search.block_size]
            self._say(f"step {step}: blocks of {search.block_size} go on with mask rates {low:.2f} to {high:.2f}")

    def saved(self, saved: Saved) -> None:
        """After a save has ended, well or not."""
        if self._metrics is None:
            return
        beside, alone = self._seconds[True], self._seconds[False]
        slowdown = median(beside) / median(alone) - 1 if beside and alone else None
        beside.clear()
        if saved.checkpoint is None:
            self._say(f"step {saved.step}: NOT SAVED after {saved.tries} tries: {saved.error}")
        else:
            again = f" at try {saved.tries}" * (saved.tries > 1)
            self._say(f"step {saved.step}: saved {saved.checkpoint}{again}")
        self._metrics.write(
            saved.step,
            {
                "checkpoint/tries": saved.tries,
                "checkpoint/failed": int(saved.checkpoint is None),
                "checkpoint/blocked_seconds": saved.blocked,
                "checkpoint/seconds": saved.seconds,
                "checkpoint/slowdown": slowdown,
            },
        )

    def warned(self, text: str) -> None:
        """Tell of a step that stands out."""
        self._say(text)

    def stopped(self, step: int, by: signal.Signals | None) -> None:
        """After the checkpoint of a run that was asked to stop."""
        name = "a signal to another rank" if by is None else by.name
        self._say(f"stopped after step {step} by {name}: the same command goes on from here")

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.message(text)
