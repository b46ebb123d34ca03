"""Readers of files that people or disks may have damaged: an error that a person can read, or success; nothing else."""

from __future__ import annotations

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.checkpoint.verify import check_checkpoint
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.shards import open_shards
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.faults import parse_faults
from tests.faults.saving import save, sealed

FUZZ = settings(
    max_examples=150,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@st.composite
def damages(draw, content: bytes) -> bytes:
    """A file with bytes changed, cut out, doubled, or put in."""
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


# What JSON and YAML can hold, in places where something else belongs.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def replaced(draw, tree):
    """A tree of dictionaries and lists with one value put in another's place, or removed."""
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


def message(action, *arguments) -> str:
    """Of the error that a person reads; empty where there is none. Anything but ValueError and OSError is a defect."""
    found = "nothing"
    try:
        action(*arguments)
    except (ValueError, OSError) as error:
        found = str(error).strip()
    assert found, "an error without a word"
    return "" if found == "nothing" else found


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    folder.mkdir()
    return save(folder, 1)


@pytest.fixture
def checkpoint(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


@FUZZ
@given(data=st.data())
def test_recipes(data, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data.draw(damages(QUICKSTART.read_bytes())))
    message(load_recipe, path)
    path.write_text(yaml.safe_dump(data.draw(replaced(yaml.safe_load(QUICKSTART.read_text())))))
    message(load_recipe, path)


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


def read_all(checkpoint):
    with TensorReader(checkpoint) as reader:
        for tensor, shape in reader.shapes.items():
            reader.read(tensor, (0,) * len(shape), shape)


@FUZZ
@given(data=st.data(), name=st.sampled_from(["index.json", "rank-00000.safetensors"]))
def test_indexes_and_headers_of_tensors(data, name, pristine, checkpoint):
    """Whatever hashes say: who makes a folder can make these, too."""
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
    assert "that is no file of the checkpoint" in message(read_all, checkpoint)
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


@FUZZ
@given(data=st.data())
def test_data_manifests(data, prepared, tmp_path):
    folder = tmp_path / "shards"
    if not folder.exists():
        shutil.copytree(prepared, folder)
    manifest = folder / "manifest.json"
    whole = (prepared / "manifest.json").read_bytes()
    manifest.write_bytes(data.draw(damages(whole)))
    message(load_manifest, str(folder))
    manifest.write_text(json.dumps(data.draw(replaced(json.loads(whole)))))
    message(load_manifest, str(folder))


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
