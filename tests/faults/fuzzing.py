"""Damage files for fuzzing; reading one must end with success or with an error that a person can read."""

from __future__ import annotations

import json
from datetime import timedelta

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=150,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


@st.composite
def damages(draw, content: bytes) -> bytes:
    """Draw a file with bytes changed, removed, doubled or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "double", "insert", "end"]))
        size = draw(st.integers(1, 40))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + size]
        elif kind == "double":
            data[place:place] = data[place : place + size]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=20))
        else:
            del data[place:]
    return bytes(data)


# What JSON and YAML can hold, in places where something else belongs; the constants are those of attacks.
VALUES = st.recursive(
    st.sampled_from([None, True, -1, 0, 2**32 - 2, 10**18, float("nan"), float("inf"), "", "\0", "../../x", [], {}])
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def replaced(draw, tree):
    """Draw a tree of dictionaries and lists with one value replaced or removed."""
    tree = json.loads(json.dumps(tree))
    here = tree
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return tree
        key = draw(st.sampled_from(keys))
        if isinstance(here[key], dict | list) and here[key] and draw(st.booleans()):
            here = here[key]
            continue
        if draw(st.booleans()) or isinstance(here, list):
            here[key] = draw(VALUES)
        else:
            del here[key]
        return tree


HOSTILE = (
    *(b"", b"null", b"[]", b"{}", b"0", b'"x"', b"NaN", b"1e999", b"\0" * 64, b"\xff\xfe", b"\x80\x02.", b"PK\x05\x06"),
    *(b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b"- " * 20_000, b"\xff" * 8 + b"{}", b'{"a": "\\ud800"}\n'),
    *(b"a: &a [1]\nb: [*a, *a]", b"!!timestamp x", b'a: !!int ""', b"1: 2", b"? [a]\n: b", b"<<: {a: 1}"),
)


@st.composite
def spoilt(draw, content: bytes, name: str) -> bytes:
    """Draw what may stand in a file in place of `content`: damaged, of a wrong type somewhere, or something else."""
    kinds = [damages(content), st.sampled_from(HOSTILE)]
    if name.endswith((".json", ".jsonl")):
        first, _, rest = content.partition(b"\n") if name.endswith(".jsonl") else (content, b"", b"")
        kinds.append(replaced(json.loads(first)).map(lambda tree: json.dumps(tree).encode() + b"\n" + rest))
    if name.endswith(".yaml"):
        kinds.append(replaced(yaml.safe_load(content)).map(lambda tree: yaml.safe_dump(tree).encode()))
    return draw(st.one_of(kinds))


def message(action, *arguments) -> str:
    """Return the error that a person reads, or an empty text. Anything but ValueError and OSError is a defect."""
    found = "nothing"
    try:
        action(*arguments)
    except (ValueError, OSError) as error:
        found = str(error).strip()
    assert found, "an error without a word"
    assert "errors.pydantic.dev" not in found, "pydantic's pages are for whoever wrote the program"
    return "" if found == "nothing" else found
