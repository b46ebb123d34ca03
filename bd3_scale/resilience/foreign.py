"""Folders that others made: a file is read if it truly lies there, and a setting goes on if it names no code.

What a stranger's configuration names may be a class or repository whose code a library runs (`auto_map`,
`custom_pipelines`, an attention kernel), or a file of this machine. So only numbers, switches and the text of
tokenisers' own settings go on from one.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bd3_scale.resilience.files import read_object
from bd3_scale.resilience.leftovers import temporary_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# Settings of a tokeniser and of generation that are text, and the parts of theirs that are.
_TEXTS = re.compile(r"\w+_tokens?|chat_template|(padding|truncation)_side|model_input_names|stop_strings")
_PARTS = {"content", "__type", "name", "template"}
# What transformers reads of a model folder: settings, and files that hold vocabularies in one way or another.
_SETTINGS = (CONFIG, "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
# What names code, whatever it holds.
CODE = frozenset(
    (
        "auto_map",
        "custom_pipelines",
        "processor_class",
        "attn_implementation",
        "_attn_implementation",
        "custom_generate",
    )
)


def file_in(folder: Path, name: str) -> Path | None:
    """Return the path of a file in a folder, or None where the folder has nothing of that name.

    A link may lead to another file of the folder, or to the blobs of the Hugging Face cache that the folder is part of.

    Raises:
        ValueError: a link that leads elsewhere or nowhere, or what is no regular file; OSError: it cannot be looked at.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise ValueError(f"{path} is a link that leads nowhere ({error.strerror}): put the file in its place") from None
    if not any(real.is_relative_to(place) for place in _places(folder)):
        raise ValueError(f"{path} leads out of its folder, to {real}: put the file itself in its place")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"{path} is no regular file, but a folder, a pipe, a device or a socket: give a file")
    return path


def _places(folder: Path) -> Iterator[Path]:
    root = Path(os.path.realpath(folder))
    yield root
    for snapshot in (root, *root.parents):
        # models--org--name/snapshots/<revision>/config.json is a link to models--org--name/blobs/<hash>.
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
            yield snapshot.parent.parent / "blobs"


def object_in(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder; an empty one where there is no such file. See `file_in`."""
    path = file_in(folder, name)
    return {} if path is None else read_object(path)


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors files of a Hugging Face folder by their names: one, or those that its index names.

    FileNotFoundError: there are none, or one is missing. ValueError: the index is none; see `file_in`.
    """
    if file_in(folder, WEIGHTS_INDEX) is None:
        names = [WEIGHTS]
        if file_in(folder, WEIGHTS) is None:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; it has {', '.join(pickles[:3])}: save it again with safe_serialization=True" if pickles else ""
            raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{hint}")
    else:
        names = sorted(set(weight_map(folder).values()))
    found = {name: file_in(folder, name) for name in names}
    if missing := [name for name, path in found.items() if path is None]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names: download it again")
    return {name: path for name, path in found.items() if path is not None}


def weight_map(folder: Path) -> dict[str, str]:
    """Return which file holds each tensor, as the index of a folder says. ValueError: it does not."""
    found = object_in(folder, WEIGHTS_INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(_is_shard(name) for name in found.values()):
        raise ValueError(
            f"{folder / WEIGHTS_INDEX} must hold a `weight_map` from tensors to files beside it, *.safetensors"
        )
    return found


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and os.path.basename(name) == name and name.endswith(".safetensors")


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a stranger's configuration that name no code, no class and no file."""
    return {key: value for key, value in content.items() if _names_nothing(key, value)}


def _names_nothing(key: str, value: Any, part: bool = False) -> bool:
    if key in CODE:
        return False
    if isinstance(value, dict):
        return all(_names_nothing(name, entry, part=True) for name, entry in value.items())
    if isinstance(value, list):
        return all(_names_nothing(key, entry, part) for entry in value)
    return not isinstance(value, str) or _TEXTS.fullmatch(key) is not None or (part and key in _PARTS)


def without_code(content: Any) -> Any:
    """Return a configuration without what names code, at any depth; it keeps its other text."""
    if isinstance(content, dict):
        return {key: without_code(value) for key, value in content.items() if key not in CODE}
    return [without_code(value) for value in content] if isinstance(content, list) else content


@contextmanager
def for_transformers(folder: Path) -> Iterator[Path]:
    """A temporary folder with what transformers may read of a model folder: its configuration, tokeniser and weights.

    Given the folder itself, transformers also follows links, waits for pipes, reads the files that settings name, and
    runs `custom_generate/generate.py` of a local folder whatever `trust_remote_code` says.

    ValueError, FileNotFoundError: see `file_in` and `weight_files`.
    """
    with temporary_folder("model") as scratch:
        for name in _SETTINGS:
            content = object_in(folder, name)
            kept = without_code(content) if name == CONFIG else settings_of(content) | _class_of(content)
            if content:
                (scratch / name).write_text(json.dumps(kept), encoding="utf-8")
        vocabularies = {name: path for name in _VOCABULARIES if (path := file_in(folder, name))}
        has_weights = any(os.path.lexists(folder / name) for name in (WEIGHTS, WEIGHTS_INDEX))
        for name, path in (vocabularies | (weight_files(folder) if has_weights else {})).items():
            (scratch / name).symlink_to(path.absolute())
        if file_in(folder, WEIGHTS_INDEX):
            (scratch / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map(folder)}))
        yield scratch


def _class_of(content: Mapping[str, Any]) -> dict[str, str]:
    name = content.get("tokenizer_class")
    return {"tokenizer_class": name} if isinstance(name, str) else {}
