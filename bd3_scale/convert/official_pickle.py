"""Read files of `torch.save` without running code that they name.

A pickle names classes and functions to call. torch's `weights_only` reader allows those of tensors and refuses others,
but every Lightning checkpoint of the official code has its Hydra configuration and its tokeniser pickled next to the
weights. Objects of those packages are read as stand-ins that hold what was pickled: the packages are not imported, and
nothing of them is called. All other names are refused. So are names that torch's reader allows but tensors do not need:
some of them allocate gigabytes from a single number.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bd3_scale.convert.pickle_scan import names_called
from bd3_scale.resilience.readers import reader

_STOOD_IN_FOR = re.compile(
    r"(omegaconf|transformers|tokenizers)\..+|typing\.Any|builtins\.(dict|list|tuple|int|float|str|bool)"
)
_DEFAULTDICT = "collections.defaultdict"
_OF_TENSORS = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)|torch\.(Size|device)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch\.(float|double|half|bfloat|long|int|uint|short|bool|complex|cfloat|cdouble)\d*(_e\w+)?"
)
# Largest pickle that is read; those of published models have some hundred kB, and some MB with a tokeniser.
_LIMIT_BYTES = 1 << 26
_PROGRAM = "data.pkl"
# Exceptions that torch's reader raises for damaged or hostile pickles, besides its own.
_UNREADABLE = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, EOFError, OSError,
    pickle.UnpicklingError, struct.error, OverflowError,
)  # fmt: skip
_DEEPEST = 16
_MOST_VALUES = 100_000


class _StandIn:
    """Stands in for an object whose class is not imported; `state` is its pickled state."""

    state: object = None

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def _empty_dict(*args: object) -> dict[object, object]:
    return {}


@reader("a file of torch.save")
def load_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file of `torch.save`; tensors are mapped and read when they are used.

    Raises:
        ValueError: the file is truncated, corrupt or of another format, holds no dictionary, or its pickle has names
            that tensors do not need.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: give a file of torch.save")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} {_describe_file(path)}")
    others = [name for name in names_called(_program(path)) if not _OF_TENSORS.fullmatch(name)]
    if unsafe := sorted(name for name in others if name != _DEFAULTDICT and not _STOOD_IN_FOR.fullmatch(name)):
        raise ValueError(_unsafe_message(path, unsafe))
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_empty_dict if name == _DEFAULTDICT else _StandIn, name) for name in others
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            f"download it again, or save its tensors alone:\n  {_save_again(path)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, and a state dict or a Lightning checkpoint is expected"
        )
    return content


def _program(path: Path) -> bytes:
    """Return the pickle in a file of torch.save, a zip archive without compression."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    if any(file.compress_type != zipfile.ZIP_STORED or file.file_size > file.compress_size for file in files):
        raise ValueError(f"{path} was not written by torch.save: a file in it is compressed")
    if any(file.filename.endswith(_PROGRAM) and file.file_size > _LIMIT_BYTES for file in files):
        raise ValueError(f"{path} is not loaded: its pickle is larger than {_LIMIT_BYTES >> 20} MiB")
    try:
        program: bytes = torch._C.PyTorchFileReader(str(path)).get_record(_PROGRAM)
    except RuntimeError as error:
        raise ValueError(
            f"{path} was not written by torch.save, or is corrupt: {str(error).splitlines()[0]}"
        ) from error
    return program


def plain(value: object) -> Any:
    """Return the dictionaries, lists and scalars of a Hydra (OmegaConf) configuration.

    Other objects, and values nested too deeply, become None. ValueError: it is larger than any configuration.
    """
    left = _MOST_VALUES

    def copied(value: object, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"its configuration has more than {_MOST_VALUES:,} values")
        if depth > _DEEPEST:
            return None
        if isinstance(value, _StandIn):
            state = value.state if isinstance(value.state, Mapping) else {}
            return copied(state.get("_content", state.get("_val")), depth + 1)
        if isinstance(value, dict):
            return {key: copied(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
        if isinstance(value, list):
            return [copied(item, depth + 1) for item in value]
        return value if isinstance(value, str | int | float) else None

    return copied(value, 0)


def _describe_file(path: Path) -> str:
    """Return what a file that is no zip archive is, for a message."""
    with path.open("rb") as file:
        head = file.read(32)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder"
    if head.startswith(b"PK"):
        return "is truncated: download or copy it again"
    if head.startswith(b"\x80"):
        return (
            "has the format that torch.save had before torch 1.6: load it with the torch that wrote it, and save it "
            "again with a newer one"
        )
    if not head:
        return "is empty: download or copy it again"
    return "is neither a file of torch.save nor a safetensors file"


def _unsafe_message(path: Path, names: list[str]) -> str:
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"{path} is not loaded: its pickle calls {listed}, which tensors do not need and which could run any code. If "
        f"you trust its author, save only its tensors, on a machine where the code that it needs is installed:\n"
        f"  {_save_again(path)}"
    )


def _save_again(path: Path) -> str:
    keep = "{k: v for k, v in c.items() if k in ('state_dict', 'ema') or torch.is_tensor(v)}"
    return (
        f"python -c \"import torch; c = torch.load({str(path)!r}, weights_only=False, map_location='cpu'); "
        f"torch.save({keep}, 'weights.ckpt')\""
    )
