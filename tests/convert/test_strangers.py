"""Check malicious model folders: their code and links are not followed, passed on, or waited for."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.checkpoint import source_ids as source_ids_module
from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.convert import importer as importer_module
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.inspect import inspect
from bd3_scale.convert.serving import model_card
from bd3_scale.data import tokenizer_folder as tokenizer_folder_module
from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from tests.convert.models import config, save_folder, sdar_folder, transformers_model

CODE = {
    "AutoConfig": "somebody/odd--configuration_odd.OddConfig",
    "AutoModelForCausalLM": "somebody/odd--modeling_odd.OddModel",
    "AutoTokenizer": ["somebody/odd--tokenization_odd.OddTokenizer", None],
}
# Keys and values that a library may take for the name of code, at every depth.
FOREIGN = {
    "auto_map": CODE,
    "custom_pipelines": {"odd": {"impl": "somebody.OddPipeline", "pt": ["AutoModel"]}},
    "processor_class": "somebody/OddProcessor",
    "attn_implementation": "somebody/kernel",
    "_name_or_path": "somebody/odd",
    "vision_config": {"hidden_size": 3, "auto_map": CODE, "parts": [{"auto_map": CODE}]},
    "tokenizer_file": "/somebody/tokenizer.json",
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sound")
    return {
        "sdar": sdar_folder(place / "sdar"),
        "qwen3": save_folder(place / "qwen3", transformers_model("Qwen3", vocab_size=300)),
    }


@pytest.fixture(params=["qwen3", "sdar"])
def folder(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    """Copy a folder that names its own code in every configuration and links to a private file outside."""
    (tmp_path / "secret").write_text("private")
    folder = shutil.copytree(sound[request.param], tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        edit(folder / name, **FOREIGN)
    edit(folder / "config.json", of_an_engine=7)
    edit(folder / "tokenizer_config.json", pad_token={"content": "<|endoftext|>", "auto_map": CODE})
    edit(folder / "processor_config.json", **FOREIGN)
    (folder / "modeling_odd.py").write_text("# somebody's code\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("# somebody's code\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "chat_template.sh").write_text("# somebody's code\n")
    return folder


def texts(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().decode("utf-8", "replace") for path in files}


def check_clean(folder: Path) -> None:
    found = texts(folder)
    assert [name for name, text in found.items() if "somebody" in text or "private" in text] == []
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def check_export_is_ours(folder: Path) -> None:
    check_clean(folder)
    kind = config(folder)["model_type"]
    assert config(folder).get("auto_map") == {
        "qwen3": None,
        "sdar": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
    }.get(kind)
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"tokenizer_config.json", "chat_template.jinja"}
    if kind == "sdar":
        names |= {"sglang.yaml", *(f"{name}_sdar.py" for name in ("configuration", "generation", "mlp", "modeling"))}
    assert {path.name for path in folder.iterdir()} == names


def test_an_import_and_its_export_name_nobody_s_code(folder: Path, tmp_path: Path) -> None:
    run_import(plan_import(folder), tmp_path / "native")
    check_clean(tmp_path / "native")
    run_export(plan_export(tmp_path / "native"), tmp_path / "out", check=False)
    check_export_is_ours(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert config(tmp_path / "out")["of_an_engine"] == 7


def test_an_import_of_before_and_what_was_trained_from_it_are_exported_clean(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check imports of earlier versions, which kept the source's settings as they were."""
    with monkeypatch.context() as before:
        for module in (importer_module, source_ids_module, tokenizer_folder_module):
            before.setattr(module, "safe_settings", dict)
        run_import(plan_import(folder), tmp_path / "native")
    old = texts(tmp_path / "native")
    for name in ("imported/config.json", "tokenizer/tokenizer_config.json", "tokenizer/source_ids.json"):
        assert "somebody/odd--configuration_odd.OddConfig" in old[name], name
    run_export(plan_export(tmp_path / "native"), tmp_path / "out", check=False)
    check_export_is_ours(tmp_path / "out")
    # A run that begins from the import writes the tokeniser's folder.
    tokenizer = tmp_path / "native" / "tokenizer"
    write_tokenizer(load_tokenizer(tokenizer), tokenizer, tmp_path / "run")
    check_clean(tmp_path / "run")


def test_a_folder_of_the_cache_is_imported_with_its_template(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    run_import(plan_import(snapshot), tmp_path / "native")
    run_export(plan_export(tmp_path / "native"), tmp_path / "out", check=False)
    check_export_is_ours(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert ChatTemplate(snapshot).prompt([{"role": "user", "content": "Hi"}]) == "Hi"


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def socket_at(path: Path) -> None:
    # The path of a socket must be short.
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def huge(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)  # a sparse file: a terabyte of zeros that takes no space


JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
ATTACKS: list[tuple[str, Callable[[Path], Any], str]] = [
    *((name, link("../secret"), "is a link out of its folder, to .*secret") for name in JSON_FILES),
    *(
        (name, link("/dev/zero"), "is a link out of its folder, to /dev/zero")
        for name in ("config.json", "model.safetensors")
    ),
    *((name, os.mkfifo, "is not a regular file") for name in (*JSON_FILES, "chat_template.jinja", "model.safetensors")),
    *((name, socket_at, "is not a regular file") for name in ("config.json", "tokenizer.model")),
    *(
        (name, Path.mkdir, "is not a regular file")
        for name in (*JSON_FILES, "chat_template.jinja", "model.safetensors")
    ),
    *((name, huge, "is larger than 128 MiB") for name in ("config.json", "tokenizer.json")),
    ("chat_template.jinja", link("../secret"), "is a link out of its folder, to .*secret"),
    ("chat_template.jinja", link("/dev/zero"), "is a link out of its folder, to /dev/zero"),
    ("chat_template.jinja", link("chat_template.jinja"), "is a broken link"),
    ("chat_template.jinja", link("gone"), "is a broken link"),
    ("chat_template.jinja", huge, "is larger than 1 MiB"),
    ("chat_template.jinja", lambda path: path.write_bytes(b"{{ x }}\xff"), "chat_template.jinja is not UTF-8 text"),
    ("model.safetensors", link("../model.safetensors"), "is a link out of its folder"),
    ("model.safetensors.index.json", link("../secret"), "is a link out of its folder"),
    *(
        (
            "model.safetensors.index.json",
            lambda path, name=name: edit(path, weight_map={"w": name}),
            r"from tensor names to \*\.safetensors",
        )
        for name in ("../model.safetensors", "/etc/passwd", "pytorch_model.bin")
    ),
    ("config.json", lambda path: path.write_text("[" * 10**6), "nested too deeply"),
    (
        "config.json",
        lambda path: path.write_text('{"architectures": [["SDARForCausalLM"]]}'),
        "is not supported",
    ),
    ("generation_config.json", lambda path: path.write_text('{"a":' * 400 + "1" + "}" * 400), "nested too deeply"),
]


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
@pytest.mark.parametrize(("name", "attack", "words"), ATTACKS)
def test_a_file_that_leads_elsewhere_or_never_ends_is_refused_in_one_line(
    name: str, attack: Callable[[Path], Any], words: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    (folder / name).unlink(missing_ok=True)
    attack(folder / name)
    began = time.monotonic()
    with pytest.raises((ValueError, OSError), match=words) as caught:
        run_import(plan_import(folder), tmp_path / "native")
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_tokeniser_s_folder_and_an_inspection_follow_nothing_either(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("../secret")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        ChatTemplate(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_tokenizer(folder)
    assert "is a link out of its folder" in str(inspect(folder).details["tokeniser"])
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match="is not a regular file"):
        inspect(folder)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_model_card_holds_a_source_s_name_as_text(folder: Path, tmp_path: Path) -> None:
    source = folder.rename(tmp_path / "a`` b`\n\n# Title\n[x](y)<img src=z>")
    run_import(plan_import(source), tmp_path / "native")
    manifest = read_manifest(tmp_path / "native")
    plan = plan_export(tmp_path / "native")
    last = model_card(plan.kind, plan.config, manifest).splitlines()[-1]
    kind = plan.config["architectures"][0]
    assert last.endswith(f"imported from ``` {kind}, a`` b`  # Title [x](y)<img src=z> ```.")
