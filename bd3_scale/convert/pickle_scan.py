"""Analyse a pickle from its opcodes without running it: the names that it calls, and whether it would end.

A pickle has no loops, yet a few opcodes can each double what the one before made: tuples of tuples, whose hash visits
every leaf, and bytes that are encoded again and again. A short file can thus run for ever.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from dataclasses import dataclass
from typing import Any

ENCODE = "_codecs.encode"  # how Python 2's protocol writes bytes
# Most leaves of a tuple, each counted as often as it is reached.
_MOST_LEAVES = 1_000_000
# Most opcodes; a pickle with a large vocabulary next to the weights has some millions.
_MOST_STEPS = 5_000_000
_GROWING = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ", "BINPERSID", "DUP"}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


@dataclass(frozen=True)
class _Item:
    """An object on the pickle machine's stack. leaves: number of leaves below it; calls: its creation calls a name."""

    leaves: int = 1
    calls: bool = False
    name: str = ""


_MARK = _Item()


def names_called(program: bytes) -> set[str]:
    """Return the dotted names that a pickle of `torch.save` calls or instantiates.

    ValueError: it might run for ever, or is damaged.
    """
    stack: list[_Item] = []
    memo: dict[int, _Item] = {}
    names: set[str] = set()
    try:
        argument: Any
        for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if number >= _MOST_STEPS:
                raise ValueError(f"its pickle has more than {_MOST_STEPS:,} steps")
            if opcode.name in _PUTS:
                memo[argument] = stack[-1]
            elif opcode.name in _GETS:
                stack.append(memo[argument])
            elif opcode.name == "MARK":
                stack.append(_MARK)
            elif opcode.name == "GLOBAL":
                names.add(name := _modern(*argument.split(" ", 1)))
                stack.append(_Item(name=name))
            else:
                taken = _take(stack, opcode)
                stack += [_made(opcode.name, taken)] * len(opcode.stack_after)
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle is damaged") from error
    return names


def _take(stack: list[_Item], opcode: pickletools.OpcodeInfo) -> list[_Item]:
    before = list(opcode.stack_before)
    taken: list[_Item] = []
    if pickletools.stackslice in before:
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    return [stack.pop() for _ in before][::-1] + taken[::-1]


def _made(opcode: str, taken: list[_Item]) -> _Item:
    if opcode not in _GROWING:
        return _Item()
    calls = any(item.calls for item in taken)
    if opcode == "REDUCE" and taken[0].name == ENCODE and calls:
        raise ValueError("its pickle encodes again what it has encoded, and could grow without end")
    leaves = 1 + sum(item.leaves for item in taken)
    if leaves > _MOST_LEAVES:
        raise ValueError(f"its pickle makes an object of more than {_MOST_LEAVES:,} parts, and might never end")
    return _Item(leaves, calls or opcode in ("REDUCE", "NEWOBJ"))


def _modern(module: str, name: str) -> str:
    """Return Python 3's name for a Python 2 name, as torch's reader translates it."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[module, name]
    else:
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"
