"""Read and write YAML as recipes and profiles use it: YAML 1.2's core schema, with bounds against hostile files.

PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false and `012` is ten. Beyond the core schema, digits may be
grouped (`10_000`). Errors are: aliases (with which a small file expands to a large value), tags, keys that are not text
or appear twice, and deep nesting.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LIMIT_BYTES = 1 << 20
_DEEPEST = 32
_MOST_VALUES = 10_000
# Characters of a file that a message shows: a log should not hold the rest of it.
_WIDTH = 120


class _Loader(yaml.SafeLoader):
    _depth = _num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error("aliases are not read; write the value again, or use `extends`", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _error("tags are not read; write the value without", event.start_mark)
        self._depth += 1
        self._num_values += 1
        if self._depth > _DEEPEST:
            raise _error("it is nested too deeply", event.start_mark)
        if self._num_values > _MOST_VALUES:
            raise _error(f"it holds more than {_MOST_VALUES:,} values", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _error("a key is not text; put it in quotes", key.start_mark)
            if key.value in seen:
                raise _error(f"key {key.value[:_WIDTH]!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null)?$", ["~", "n", ""]),
    ("bool", r"(?:true|false)$", ["t", "f"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Dumper(yaml.SafeDumper):
    """Quote exactly the text that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_yaml(text: str | bytes) -> Any:
    """Return the value of a document. ValueError: it is no YAML, or not plain; one line, with the position."""
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{error.reason} at offset {error.position}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{place}{' '.join(str(error.problem).split())[:_WIDTH]}") from None
    except ValueError:
        raise ValueError("a number has too many digits") from None


def dump_yaml(value: Any) -> str:
    """Return `value` as a document that `parse_yaml` reads as equal; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _error(problem: str, mark: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
