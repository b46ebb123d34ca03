"""Check the declaration of sampling options: its checks, and the command-line options made from it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import typer
from typer.testing import CliRunner

from bd3_scale.generate.config import SamplingConfig, takes_sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1: give at least 1"),
        ({"temperature": float("nan")}, "temperature is nan: give 0"),
        ({"temperature": 5e-324}, "temperature is 5e-324: give 0 .*, or 1e-06"),
        ({"top_k": 0}, "top_k is 0: give at least 1, or leave it out"),
        ({"top_p": 0.0}, "top_p is 0.0: give a probability above 0, up to 1"),
        ({"min_entropy": -0.5}, "min_entropy is -0.5: give nats"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"unmasking": "ancestrl"}, "no unmasking rule is called 'ancestrl': did you mean ancestral"),
        ({"unmasking": "entropy", "steps": 3}, "steps=3 is an option of ancestral, static, dynamic.* unmasking"),
    ],
)
def test_a_value_out_of_its_range_is_refused_without_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.fixture
def command():
    """Return a command that prints what it is given, with a different default."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @takes_sampling(max_new_tokens=7)
    def show(name: str, *, sampling: SamplingConfig, loud: bool = False) -> None:
        """Show."""
        print(json.dumps([name, asdict(sampling), loud]))

    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_a_command_has_an_option_for_each_field(command):
    assert json.loads(command("x").stdout) == ["x", asdict(SamplingConfig(max_new_tokens=7)), False]
    given = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_entropy": 1.5, "unmasking": "dynamic", "steps": 2}
    given |= {"max_new_tokens": 5, "threshold": 0.75, "seed": 11}
    assert given.keys() == {field.name for field in fields(SamplingConfig)}
    words = [str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert json.loads(command("x", "--loud", *words).stdout) == ["x", given, True]


def test_a_command_refuses_what_the_class_refuses(command):
    done = command("x", "--unmasking", "beam")
    assert "no unmasking rule is called 'beam': known are first-hitting" in str(done.exception)
    assert "Invalid value for '--temperature'" in command("x", "--temperature", "-1").output
