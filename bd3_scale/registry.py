"""Keep the registries: the extension points of the package, where a person may add named things from outside.

    from bd3_scale.registry import schedules

    @schedules.register("smoothstep")
    class Smoothstep: ...

A recipe names such modules under `plugins`, the command line with `--plugin`. Importing a module runs its decorators.
What the package itself has is registered in the same way, by the module that a registry calls its home.

This module uses the standard library only: every other package may import it, and it imports none. The homes of what a
recipe names (schedules, objectives, optimisers, attention backends) load without PyTorch, so that a launcher checks a
recipe in half a second.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

# The name of a plug-in: that of a module, with dots.
MODULE_NAME = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"

T = TypeVar("T")
Registered = TypeVar("Registered")


class Registry(Generic[T]):
    """A registry of things of one kind, by name.

    kind: the word for one of them in a message; home: the module that registers those of the package.
    """

    def __init__(self, kind: str, home: str) -> None:
        self._kind, self._home = kind, home
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that registers a class or function under a name.

        ValueError: another one has the name. The same definition, run again in a notebook, replaces the earlier one.
        """

        def add(thing: Registered) -> Registered:
            holder = self._entries.get(name)
            if holder is not None and _origin(holder) != _origin(thing):
                raise ValueError(
                    f"the {self._kind} {name!r} of {_origin(thing)[0]} has the same name as one of "
                    f"{_origin(holder)[0]}: choose another name"
                )
            self._entries[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def name_of(self, thing: T) -> str:
        """Return the name that a registered thing has."""
        return next(name for name, held in self._entries.items() if held is thing)

    def names(self) -> tuple[str, ...]:
        """Return all names: the package's, then those of imported plug-ins."""
        importlib.import_module(self._home)
        return tuple(self._entries)

    def get(self, name: str) -> T:
        """Return the thing of this name. ValueError: there is none; the message lists similar names."""
        if name in self._entries:
            return self._entries[name]
        known = self.names()
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
        raise ValueError(
            f"no {self._kind} is called {name!r}: {hint} If a plug-in defines it, name its module, as "
            "`plugins: [MODULE]` in the recipe or `bd3-scale --plugin MODULE …`"
        )


def import_plugins(modules: Sequence[str]) -> None:
    """Import modules that register things. ValueError: one cannot be imported, or is not a module's name."""
    for module in modules:
        if not re.fullmatch(MODULE_NAME, module):
            raise ValueError(f"the plug-in {module!r} is not the name of a module: give one such as my_lab.bd3")
        try:
            importlib.import_module(module)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"the plug-in {module} cannot be imported ({reason}): install it where bd3_scale is, or put the folder "
                "that contains it on PYTHONPATH; the current folder is not searched"
            ) from error


def _origin(thing: Any) -> tuple[str, str]:
    return getattr(thing, "__module__", ""), getattr(thing, "__qualname__", repr(thing))


schedules: Registry[Any] = Registry("noise schedule", "bd3_scale.diffusion.schedule")
attention_backends: Registry[Any] = Registry("attention backend", "bd3_scale.attention.backends")
source_formats: Registry[Any] = Registry("source format", "bd3_scale.data.formats")
source_cuts: Registry[Any] = Registry("source format that can be cut", "bd3_scale.data.formats")
objectives: Registry[Any] = Registry("objective", "bd3_scale.objective")
optimizers: Registry[Any] = Registry("optimizer", "bd3_scale.parallel.optimizer")
unmasking_rules: Registry[Any] = Registry("unmasking rule", "bd3_scale.generate.unmasking")
text_sets: Registry[Any] = Registry("text set", "bd3_scale.evaluate.sets")
loggers: Registry[Any] = Registry("logger", "bd3_scale.observe.loggers")
