"""Read model folders that others made: no link out of the folder, and no setting that names code.

A configuration from an unknown source may name a class or a repository whose code a library then runs (`auto_map`,
`custom_pipelines`, an attention kernel), or a file on this machine. So only numbers, booleans and the text of known
tokeniser settings are passed on.
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

# Text settings of tokenisers and of generation that are safe, and the safe keys of their nested objects.
_TEXTS = re.compile(r"\w+_tokens?|chat_template|(padding|truncation)_side|model_input_names|stop_strings")
_NESTED_TEXTS = {"content", "__type", "name", "template"}
# The files of a model folder that transformers reads: settings, and the various formats of vocabularies.
_SETTINGS = (CONFIG, "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
# Settings that name code, whatever their value.
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
    """Return the path of a file in a folder, or None if the folder has no such name.

    A link may point to another file of the folder, or to the blobs of the Hugging Face cache that holds the folder.

    Raises:
        ValueError: a link that points elsewhere or nowhere, or not a regular file. OSError: the path is not accessible.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise ValueError(f"{path} is a broken link ({error.strerror}): put the file itself there") from None
    if not any(real.is_relative_to(root) for root in _allowed_roots(folder)):
        raise ValueError(f"{path} is a link out of its folder, to {real}: put the file itself there")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"{path} is not a regular file, but a folder, a pipe, a device or a socket: give a file")
    return path


def _allowed_roots(folder: Path) -> Iterator[Path]:
    root = Path(os.path.realpath(folder))
    yield root
    for snapshot in (root, *root.parents):
        # models--org--name/snapshots/<revision>/config.json is a link to models--org--name/blobs/<hash>.
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
            yield snapshot.parent.parent / "blobs"


def object_in(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder, or an empty one if there is no such file. Raises as `file_in`."""
    path = file_in(folder, name)
    return {} if path is None else read_object(path)


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors files of a Hugging Face folder by name: a single file, or those in its index.

    FileNotFoundError: a file is missing. ValueError: the index is invalid; see also `file_in`.
    """
    if file_in(folder, WEIGHTS_INDEX) is None:
        names = [WEIGHTS]
        if file_in(folder, WEIGHTS) is None:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; it has {', '.join(pickles[:3])}: save it again with safe_serialization=True" if pickles else ""
            raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{hint}")
    else:
        names = sorted(set(weight_map(folder).values()))
    paths = {name: file_in(folder, name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names: download it again")
    return {name: path for name, path in paths.items() if path is not None}


def weight_map(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor, from the index of a folder. ValueError: the index is invalid."""
    names = object_in(folder, WEIGHTS_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(_is_shard(name) for name in names.values()):
        raise ValueError(
            f"{folder / WEIGHTS_INDEX} must hold a `weight_map` from tensor names to *.safetensors files in its folder"
        )
    return names


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and os.path.basename(name) == name and name.endswith(".safetensors")


def safe_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a foreign configuration that name no code, no class and no file."""
    return {key: value for key, value in content.items() if _is_safe(key, value)}


def _is_safe(key: str, value: Any, nested: bool = False) -> bool:
    if key in CODE:
        return False
    if isinstance(value, dict):
        return all(_is_safe(name, entry, nested=True) for name, entry in value.items())
    if isinstance(value, list):
        return all(_is_safe(key, entry, nested) for entry in value)
    return not isinstance(value, str) or _TEXTS.fullmatch(key) is not None or (nested and key in _NESTED_TEXTS)


def without_code(content: Any) -> Any:
    """Return a configuration without the settings that name code, at any depth; other text stays."""
    if isinstance(content, dict):
        return {key: without_code(value) for key, value in content.items() if key not in CODE}
    return [without_code(value) for value in content] if isinstance(content, list) else content


@contextmanager
def for_transformers(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with the settings, the tokeniser and the weights that transformers may read of a folder.

    Given the folder itself, transformers would follow links, wait for pipes, read the files that settings name, and
    run `custom_generate/generate.py` of a local folder whatever `trust_remote_code` says.

    ValueError, FileNotFoundError: see `file_in` and `weight_files`.
    """
    with temporary_folder("model") as scratch:
        for name in _SETTINGS:
            content = object_in(folder, name)
            kept = without_code(content) if name == CONFIG else safe_settings(content) | _class_of(content)
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
