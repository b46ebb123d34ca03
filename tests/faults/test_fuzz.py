"""Fuzz readers of files: each result is success or an error that a person can read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.checkpoint.verify import check_checkpoint
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.shards import open_shards
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.faults import parse_faults
from tests.faults.fuzzing import FUZZ, damages, message, replaced
from tests.faults.saving import save, sealed


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    folder.mkdir()
    return save(folder, 1)


@pytest.fixture
def checkpoint(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


@FUZZ
@given(text=st.text(max_size=60) | st.from_regex(r"\w{1,6}@[\w.]{1,12}(:\w{1,5}=\w{1,4})?", fullmatch=True))
def test_faults(text):
    message(parse_faults, text)


@FUZZ
@given(data=st.data())
def test_checkpoint_manifests(data, pristine, checkpoint):
    manifest = checkpoint / "manifest.json"
    whole = (pristine / "manifest.json").read_bytes()
    damaged = data.draw(damages(whole))
    manifest.write_bytes(damaged)
    assert bool(message(check_checkpoint, checkpoint, "full")) == (damaged != whole)
    manifest.write_bytes(json.dumps(data.draw(replaced(json.loads(whole)))).encode())
    message(check_checkpoint, checkpoint, "full")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 5}, "has format 5; this version reads formats 3 to 4: use the version that wrote it"),
        ({"step": "x"}, "cannot be read by this version: step: Input should be a valid integer"),
        ({"model": [1]}, "cannot be read by this version: model: "),
        ({"format": 3, "recipe": {"model": [1]}}, "cannot be read by this version: name: "),
    ],
)
def test_a_sealed_manifest_of_another_version_is_told_in_one_line(changes, words, checkpoint):
    (checkpoint / "manifest.json").write_text(sealed(checkpoint, **changes))
    found = message(read_manifest, checkpoint)
    assert words in found
    assert "\n" not in found


def test_a_key_of_a_later_version_in_the_model_is_named(checkpoint):
    model = json.loads((checkpoint / "manifest.json").read_text())["model"]
    (checkpoint / "manifest.json").write_text(sealed(checkpoint, model=model | {"experts": 2}))
    assert "it has the key model.experts, which a newer version wrote" in message(read_manifest, checkpoint)


def read_all(checkpoint):
    with TensorReader(checkpoint) as reader:
        for tensor, shape in reader.shapes.items():
            reader.read(tensor, (0,) * len(shape), shape)


@FUZZ
@given(data=st.data(), name=st.sampled_from(["index.json", "rank-00000.safetensors"]))
def test_indexes_and_headers_of_tensors(data, name, pristine, checkpoint):
    """Fuzz them without the protection of hashes, which the author of a folder can make, too."""
    (checkpoint / name).write_bytes(data.draw(damages((pristine / name).read_bytes())))
    message(read_all, checkpoint)
    index = json.loads((pristine / "index.json").read_bytes())
    (checkpoint / "index.json").write_text(json.dumps(data.draw(replaced(index))))
    shutil.copy(pristine / "rank-00000.safetensors", checkpoint)
    message(read_all, checkpoint)
    shutil.copy(pristine / "index.json", checkpoint)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "../../x", "a/../../outside", "..", ".", "a/b"])
def test_no_path_of_a_checkpoint_leads_out_of_it(path, checkpoint):
    index = json.loads((checkpoint / "index.json").read_text())
    next(iter(index.values()))["boxes"][0]["file"] = path
    (checkpoint / "index.json").write_text(json.dumps(index))
    assert "this is no file of the checkpoint" in message(read_all, checkpoint)
    if path != "a/b":
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        text = sealed(checkpoint, files={path: next(iter(files.values()))})
        (checkpoint / "manifest.json").write_text(text)
        assert "cannot be read by this version" in message(check_checkpoint, checkpoint, "full")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("a few words of text and a few more " * 60)
    prepare([folder / "text.txt"], folder / "shards", load_tokenizer("bytes"), 32, holdout=0.0, workers=1)
    return folder / "shards"


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_indexes_of_shards(data, prepared, tmp_path):
    folder = tmp_path / f"shards {len(list(tmp_path.iterdir()))}"
    shutil.copytree(prepared, folder)
    index = folder / "train" / "index.json"
    whole = index.read_bytes()
    index.write_bytes(data.draw(damages(whole) | replaced(json.loads(whole)).map(lambda t: json.dumps(t).encode())))

    def read():
        shards = open_shards(DataRecipe(path=str(folder), seq_len=32), load_manifest(str(folder)), "train")
        for sample in range(min(3, len(shards))):
            assert shards[sample]["tokens"].shape == (32,)

    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    outside = set(os.listdir(tmp_path.parent))
    message(read)
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == before
    assert set(os.listdir(tmp_path.parent)) == outside
