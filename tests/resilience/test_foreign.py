"""Test that files and settings of foreign model folders are read safely."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bd3_scale.resilience.foreign import file_in, for_transformers, object_in, safe_settings, weight_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("private")
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@contextmanager
def refused(words: str, *errors: type[Exception]) -> Iterator[None]:
    """Expect an error in one line with these words, at once."""
    began = time.monotonic()
    with pytest.raises(errors or ValueError, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


def snapshot(cache: Path, name: str, content: str) -> Path:
    """Make a folder of the Hugging Face cache, where each file is a link to a blob."""
    made = cache / "models--org--name" / "snapshots" / "0123"
    made.mkdir(parents=True)
    (cache / "models--org--name" / "blobs").mkdir()
    (cache / "models--org--name" / "blobs" / "abcd").write_text(content)
    (made / name).symlink_to("../../blobs/abcd")
    return made


def test_a_file_and_a_link_to_another_file_of_the_folder_are_taken(folder: Path) -> None:
    (folder / "a.json").write_text('{"a": 1}')
    (folder / "b.json").symlink_to("a.json")
    (folder.parent / "link").symlink_to(folder, target_is_directory=True)
    for place in (folder, folder.parent / "link"):
        assert object_in(place, "a.json") == object_in(place, "b.json") == {"a": 1}
    assert file_in(folder, "c.json") is None
    assert object_in(folder, "c.json") == {}


def test_a_snapshot_of_the_cache_is_read_through_its_links(tmp_path: Path) -> None:
    made = snapshot(tmp_path, "config.json", '{"a": 1}')
    (made / "part").mkdir()
    (made / "part" / "config.json").symlink_to("../../../blobs/abcd")
    assert object_in(made, "config.json") == object_in(made / "part", "config.json") == {"a": 1}


def test_what_only_looks_like_a_cache_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "abcd").write_text('{"private": 1}')
    made = snapshot(tmp_path, "config.json", "")
    blobs = made.parents[1] / "blobs"
    (blobs / "abcd").unlink()
    blobs.rmdir()
    blobs.symlink_to(tmp_path / "home", target_is_directory=True)
    with refused("is a link out of its folder, to .*/home/abcd"):
        object_in(made, "config.json")
    (made / "other.json").symlink_to("../../../models--org--other/blobs/x")
    (tmp_path / "models--org--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--org--other" / "blobs" / "x").write_text("{}")
    with refused("is a link out of its folder"):
        object_in(made, "other.json")


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "/dev/zero", "..", "/proc/self/mem"])
def test_a_link_that_leaves_the_folder_is_refused(target: str, folder: Path) -> None:
    (folder / "config.json").symlink_to(target)
    with refused(r"config\.json is a link out of its folder, to /.*: put the file itself there"):
        object_in(folder, "config.json")


def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / "a.json").mkdir()
    os.mkfifo(folder / "b.json")
    (folder / "c.json").symlink_to("b.json")
    for name in ("a.json", "b.json", "c.json"):
        with refused(f"{name} is not a regular file"):
            object_in(folder, name)
    (folder / "d.json").symlink_to("e.json")
    (folder / "e.json").symlink_to("d.json")
    (folder / "f.json").symlink_to("nowhere")
    for name in ("d.json", "e.json", "f.json"):
        with refused(f"{name} is a broken link"):
            object_in(folder, name)


def test_weights_are_files_of_the_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for name in ("../secret", "/etc/passwd", "a/b", "..", "", "../a.safetensors", "pytorch_model.bin", 3, None):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with refused("must hold a `weight_map` from tensor names to"):
            weight_files(folder)
    index.write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    with refused("lacks part.safetensors", FileNotFoundError):
        weight_files(folder)
    (folder / "part.safetensors").symlink_to("../secret")
    with refused("part.safetensors is a link out of its folder"):
        weight_files(folder)
    index.unlink()
    (folder / "model.safetensors").symlink_to("../secret")
    with refused("model.safetensors is a link out of its folder"):
        weight_files(folder)


def test_settings_that_name_code_or_a_file_do_not_go_on() -> None:
    code = {"AutoConfig": "somebody/odd--configuration_odd.OddConfig"}
    kept = {
        "vocab_size": 300,
        "rope": {"theta": 1e4, "parts": [1, 2]},
        "sliding_window": None,
        "add_prefix_space": False,
        "eos_token": "</s>",
        "unk_token": {"content": "<unk>", "__type": "AddedToken", "lstrip": False},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "extra_special_tokens": {"image_token": "<image>"},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "padding_side": "left",
    }
    dropped = {
        "auto_map": code,
        "custom_pipelines": {"odd": {"impl": "odd.OddPipeline", "pt": ["AutoModel"]}},
        "processor_class": "OddProcessor",
        "attn_implementation": "somebody/kernel",
        "tokenizer_file": "/etc/passwd",
        "name_or_path": "somebody/odd",
        "text_config": {"hidden_size": 3, "auto_map": code},
        "parts": [{"deeper": [{"auto_map": {"AutoModel": None}}]}],
        "pad_token": {"content": "<pad>", "auto_map": code},
        "quantization_config": {"bits": 4, "quant_method": "odd"},
    }
    assert safe_settings({**dropped, **kept}) == kept


def test_transformers_is_shown_what_is_known_of_a_folder_alone(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "auto_map": {}, "a": [{"auto_map": {}}]}))
    config = {"tokenizer_class": "GPT2Tokenizer", "auto_map": {}, "tokenizer_file": "/etc/passwd", "eos_token": "e"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "model.safetensors", "adapter_config.json", "modeling_odd.py"):
        (folder / name).write_text("{}")
    (folder / "custom_generate").mkdir()
    with for_transformers(folder) as known:
        assert {path.name for path in known.iterdir()} == {
            *("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
        }
        assert object_in(known, "config.json") == {"model_type": "gpt2", "a": [{}]}
        assert object_in(known, "tokenizer_config.json") == {"tokenizer_class": "GPT2Tokenizer", "eos_token": "e"}
        assert (known / "tokenizer.json").read_text() == "{}"
    assert not known.exists()
    (folder / "special_tokens_map.json").symlink_to("../secret")
    with refused("special_tokens_map.json is a link out of its folder"), for_transformers(folder):
        pass
