"""Define the rows of the tables: how each differs from its scale's recipe, and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import Recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "paper-small"


@dataclass(frozen=True)
class Scale:
    """A size of the reproduction.

    tokenizer: `bytes`, or None if it must be given; text_bytes: bytes of training text, the same share of each
        document;
    sequences, draws: held-out sequences and noise draws; samples: texts per sampler; clipped: block sizes besides L
    with fixed intervals; longer: length of MDLM's second row, as a multiple of L.
    """

    name: str
    tokenizer: str | None
    seeds: tuple[int, ...]
    text_bytes: int
    sequences: int
    draws: int
    samples: int
    clipped: tuple[int, ...]
    longer: int = 1

    @property
    def path(self) -> Path:
        """Return the path of the scale's recipe."""
        return RECIPES / f"{self.name}.yaml"

    @cached_property
    def recipe(self) -> Recipe:
        """Return the scale's recipe."""
        return load_recipe(self.path)

    @property
    def unit(self) -> str:
        """Return the name of a token for people."""
        return "byte" if self.tokenizer == "bytes" else "token"

    @property
    def length(self) -> int:
        """Return L, the tokens of a sequence."""
        return self.recipe.data.seq_len

    @property
    def steps(self) -> int:
        """Return the training steps of a row."""
        return self.recipe.train.steps


SCALES = {
    scale.name: scale
    for scale in (
        Scale("quick", "bytes", seeds=(1,), text_bytes=400_000, sequences=64, draws=2, samples=2, clipped=(), longer=2),
        Scale(
            "small",
            "bytes",
            seeds=(1, 2),
            text_bytes=8_000_000,
            sequences=1024,
            draws=4,
            samples=64,
            clipped=(4, 16),
            # 4 · L bytes are about as much text as 128 of the paper's tokens.
            longer=4,
        ),
        Scale("paper", None, seeds=(1,), text_bytes=10**12, sequences=1024, draws=4, samples=300, clipped=(4, 16)),
    )
}


@dataclass(frozen=True, eq=False)
class Row:
    """A training.

    overrides: changes of the scale's recipe, as the command line takes them; block_sizes: those it is measured at;
    writes: its samples are measured, too; seeds: default: the scale's; longer: its sequences are `longer` times as long
    as the scale's, and as many times fewer.
    """

    name: str
    title: str
    overrides: dict[str, Any]
    block_sizes: tuple[int, ...]
    writes: bool = False
    seeds: tuple[int, ...] = field(default=())
    longer: int = 1


NO_SEARCH = {"diffusion.search_interval": "false"}
NEXT_TOKEN = NO_SEARCH | {"diffusion.objective": "next_token", "diffusion.block_size": 1}
BLOCKS = (4, 8, 16)
INTERVALS = ((0.0, 0.5), (0.3, 0.8), (0.5, 1.0), (0.0, 1.0))
LONG = "first-hitting, 8 L"  # the sampler of texts longer than the training's sequences
BASE_SHARE = 0.85  # share of the steps that train the base, as in the paper (850 K of 1 M)


def rows(scale: Scale) -> list[Row]:
    """Return all rows in the order of their training; the judge of the samples comes first."""
    length, steps, decays = scale.length, scale.steps, scale.recipe.optimizer.schedule == "wsd"
    judge = Row("judge", "AR, twice the steps", NEXT_TOKEN | {"train.steps": 2 * steps}, (1,), seeds=(99,))
    return [
        judge,
        Row("ar", "AR", NEXT_TOKEN, (1,), writes=True),
        *(
            Row(f"l{size}", f"BD3-LM, L'={size}", {"diffusion.block_size": size}, (size,), writes=True)
            for size in BLOCKS
        ),
        Row("mdlm", "MDLM", {"diffusion.block_size": length}, (length,), writes=True),
        *_block_size_one(),
        *(_finetuned(size, length, steps) for size in (4, 16)),
        _one_for_many(),
        *([_longer(scale)] if scale.longer > 1 else []),
        *(_clipped(size, *interval, steps // 2, decays) for size in (*scale.clipped, length) for interval in INTERVALS),
    ]


def _block_size_one() -> list[Row]:
    at_one = NO_SEARCH | {"diffusion.block_size": 1}
    return [
        Row("l1-uniform", "L'=1, mask rates U[0, 1]", at_one, (1,)),
        Row("l1-masked", "L'=1, all masked", at_one | {"diffusion.mask_rate_low": 1.0}, (1,)),
    ]


def _finetuned(size: int, length: int, steps: int) -> Row:
    base = round(BASE_SHARE * steps)
    schedule = f"[{{block_size: {length}, steps: {base}}}]"
    overrides = {"diffusion.block_size": size, "diffusion.block_size_schedule": schedule}
    return Row(f"l{size}-finetuned", f"L'={size} from an L'={length} base", overrides, (size,))


def _one_for_many() -> Row:
    overrides = {"diffusion.block_size": BLOCKS[-1], "diffusion.block_size_choices": str([1, *BLOCKS])}
    return Row("any", "one model for L'=1, 4, 8, 16", overrides, (1, *BLOCKS))


def _longer(scale: Scale) -> Row:
    times, train = scale.longer, scale.recipe.train
    length = times * scale.length
    overrides = {
        "diffusion.block_size": length,
        "data.seq_len": length,
        "train.global_batch_size": train.global_batch_size // times,
        "train.micro_batch_size": train.micro_batch_size // times,
    }
    return Row("mdlm-longer", f"MDLM, L={length}", overrides, (length,), seeds=(1,), longer=times)


def _clipped(size: int, low: float, high: float, steps: int, decays: bool) -> Row:
    """Return a row with a fixed interval, which trains on half the tokens of the others."""
    overrides = NO_SEARCH | {"diffusion.block_size": size, "train.steps": steps}
    if decays:
        overrides |= {"optimizer.decay_steps": steps // 3}
    overrides |= {"diffusion.mask_rate_low": low, "diffusion.mask_rate_high": high}
    return Row(f"l{size}-{low}-{high}", f"L'={size}, U[{low:g}, {high:g}]", overrides, (size,), seeds=(1,))
