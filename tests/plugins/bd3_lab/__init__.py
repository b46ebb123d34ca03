"""Ideas of a lab, one of each kind."""

import numpy as np

from bd3_scale.attention import Backend
from bd3_scale.data import Record
from bd3_scale.data.sources import lines
from bd3_scale.diffusion import Curve
from bd3_scale.generate.unmasking import BlindRule
from bd3_scale.objective import BlockDiffusion, NextToken
from bd3_scale.observe.loggers import Logger
from bd3_scale.parallel.optimizer import OptimizerFamily
from bd3_scale.registry import (
    attention_backends,
    loggers,
    objectives,
    optimizers,
    schedules,
    source_formats,
    text_sets,
    unmasking_rules,
)


@schedules.register("cubic")
class Cubic(Curve):
    """p(t) = t³: few masks for most of the time."""

    def rate(self, level):
        return level**3

    def slope(self, level):
        return 3 * level**2

    def level(self, rate):
        return np.cbrt(rate)


@objectives.register("focal")
class Focal(BlockDiffusion):
    """A token counts the less, the surer the model is of it (Lin et al., ICCV 2017)."""

    options = {"gamma": 2.0}

    def row_loss(self, nll, log_total):
        return (1 - (-nll).exp()) ** self.options["gamma"] * nll


@objectives.register("next_token_z")
class NextTokenZ(NextToken):
    """Next-token prediction that keeps logits small (Chowdhery et al., 2022)."""

    def row_loss(self, nll, log_total):
        return nll + 1e-4 * log_total**2


@optimizers.register("signum")
class Signum(OptimizerFamily):
    """The sign of the momentum (Bernstein et al., ICML 2018)."""

    states = ("momentum",)
    options = {"memory": 0.9}

    def update(self, weight, gradient, state, settings):
        state["momentum"].lerp_(gradient, 1 - settings["memory"])
        weight.mul_(1 - settings["lr"] * settings["weight_decay"])
        weight.sub_(state["momentum"].sign(), alpha=settings["lr"])


@attention_backends.register("double")
class Double(Backend):
    """The dense masks of `reference` in float64: what rounding does to a run."""

    def block_attention(self, q, k, v, spans, num_noisy, scale):
        from bd3_scale.attention.reference import reference_attention

        return reference_attention(q.double(), k.double(), v.double(), spans, num_noisy, scale).to(q.dtype)


@unmasking_rules.register("left-to-right")
class LeftToRight(BlindRule):
    """As many tokens a pass as `steps` passes need, from the left."""

    takes_steps = True

    def choose(self, masked, order, chance, step):
        return masked & (masked.cumsum() <= -(-self.block_size // self.steps))


@text_sets.register("verses")
def verses(text):
    """Poems with a slash for each end of a line."""
    return text.replace(" / ", "\n")


@source_formats.register(".tsv")
def tsv(source):
    """Yield the rows of a table, whose first line names the columns; `--field` says which one is text."""
    columns = None
    for row in lines(source):
        cells = row.text().split("\t")
        if columns is None:
            columns = cells
        else:
            yield Record(row.where, dict(zip(columns, cells, strict=False)))


@loggers.register("csv")
class CsvLoss(Logger):
    """The training loss as a table; steps that a resumed run takes again stand in it twice."""

    def start(self, run):
        self.path = run.folder / "loss.csv"

    def log(self, step, values):
        if "train/loss" in values:
            with self.path.open("a") as table:
                table.write(f"{step},{values['train/loss']}\n")
