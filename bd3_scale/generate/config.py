"""Declare the sampling options once, for Python and for every command that samples. Loads without PyTorch."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

import typer

from bd3_scale.generate.unmasking import check_options
from bd3_scale.registry import unmasking_rules

# The help of the command line lists the rules of the package; plug-ins are imported only after the options are
# declared.
_RULES = {name: unmasking_rules.get(name) for name in unmasking_rules.names()}
_CHOICES = "; ".join(f"{name}: {re.split('[.;]', rule.__doc__ or '')[0].lower()}" for name, rule in _RULES.items())
_STEPPED = ", ".join(name for name, rule in _RULES.items() if rule.takes_steps)
_THRESHOLDS = {name: rule.takes_threshold for name, rule in _RULES.items() if rule.takes_threshold}
_RANGES = "; ".join(f"{name}: {threshold.range}" for name, threshold in _THRESHOLDS.items())
LEAST_TEMPERATURE = 1e-6  # of those above 0: logits divided by less may overflow
_DEFAULTS = "; ".join(str(threshold.default) for threshold in _THRESHOLDS.values())

WeightType = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="Type of the weights in memory; bfloat16 is faster on a CPU that multiplies it natively.",
        show_default="the training's",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling options.

    temperature, top_k, top_p: see `bd3_scale.generate.draw`. unmasking, steps, threshold: an unmasking rule and its
    options, see `bd3_scale.generate.unmasking`. seed: of the first text; text i has seed + i. min_entropy: if the
    entropy of the last 256 tokens falls below it, in nats, the text ends, and these tokens are dropped; default: 4 (the
    rule of Arriola et al., ICLR 2025), and less for vocabularies of bytes or characters, whose text never reaches 4.

    ValueError: a value out of its range, an unknown rule, or an option that the rule does not take.
    """

    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens to generate; EOS ends a text earlier. 0: only fill gaps.")
    ] = 128
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 1.0
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.", show_default="all")] = None
    top_p: Annotated[
        float, typer.Option(help="Only the nucleus: the fewest tokens whose probabilities add up to this.")
    ] = 1.0
    min_entropy: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="End a text if its last 256 tokens have less entropy in nats, and drop them.",
            show_default="4; for bytes 0.75 of the held-out median",
        ),
    ] = None
    unmasking: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help=f"Which tokens a pass unmasks. {_CHOICES}.",
        ),
    ] = "first-hitting"
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Passes per block, for {_STEPPED}.", show_default="one per token")
    ] = None
    threshold: Annotated[float | None, typer.Option(help=f"{_RANGES}.", show_default=_DEFAULTS)] = None
    seed: Annotated[int, typer.Option(min=0, help="Text i depends on seed + i and its prompt alone.")] = 0

    def __post_init__(self) -> None:
        for is_valid, problem in (
            (
                self.max_new_tokens >= 0,
                f"max_new_tokens is {self.max_new_tokens}: give at least 1, or a prompt with gaps and 0",
            ),
            (
                self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE,
                f"temperature is {self.temperature}: give 0 (most likely token), or {LEAST_TEMPERATURE} and above",
            ),
            (self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}: give at least 1, or leave it out"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}: give a probability above 0, up to 1"),
            (self.min_entropy is None or self.min_entropy >= 0, f"min_entropy is {self.min_entropy}: give nats, 0 up"),
            (self.seed >= 0, f"seed is {self.seed}: give 0 or more"),
        ):
            if not is_valid:
                raise ValueError(problem)
        check_options(self.unmasking, self.steps, self.threshold)


def takes_sampling(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces a command's parameter `sampling: SamplingConfig` by one option for each field.

    defaults: defaults of the command that differ from those of the class.
    """
    hints = get_type_hints(SamplingConfig, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(SamplingConfig)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            option
            for parameter in declared
            for option in (options if parameter.name == "sampling" else [parameter.replace(kind=options[0].kind)])
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            sampling = SamplingConfig(**{option.name: given.pop(option.name) for option in options})
            command(sampling=sampling, **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
