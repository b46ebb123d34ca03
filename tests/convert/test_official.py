"""Check the import of official bd3lms checkpoints."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from bd3_scale.convert.names import named_tensors
from bd3_scale.convert.official import is_official, open_official
from tests.convert.official_dit import HEADS, HIDDEN, LAYERS, LENGTH, VOCAB, DiT, attention_mask, plain_logits

BLOCK = 4
HF_CONFIG = {
    "model_type": "bd3lm",
    "block_size": BLOCK,
    "model_length": LENGTH,
    "hidden_dim": HIDDEN,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "vocab_size": VOCAB,
    "time_conditioning": False,
    "cross_attn": True,
}
ALGO = {
    "name": "bd3lm",
    "backbone": "dit",
    "parameterization": "subs",
    "time_conditioning": False,
    "causal_attention": False,
    "cross_attn": True,
}


def prefixed(state, prefix="backbone."):
    return {prefix + name: tensor for name, tensor in state.items()}


def averaged(model):
    """Return the moving average as models/ema.py of the official code saves it."""
    return {"decay": 0.9999, "num_updates": 7, "shadow_params": [p.detach().clone() for p in model.parameters()]}


def saved(path, content):
    torch.save(content, path)
    return path


def hf_folder(folder, state, **changes):
    folder.mkdir()
    extra = {"sampling_eps_min": torch.tensor(0.3), "sampling_eps_max": torch.tensor(0.8)}
    save_file(prefixed(state) | extra, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    return folder


def hydra(**changes):
    return {
        "block_size": BLOCK,
        "algo": ALGO | changes,
        "model": {"length": LENGTH, "hidden_size": HIDDEN, "n_blocks": LAYERS, "n_heads": HEADS},
    }


class Node:
    """An object that pickles as OmegaConf's nodes do, under any name."""

    def __init__(self, content, node, parent=None):
        key = "_content" if isinstance(content, dict | list) else "_val"
        value = content
        if isinstance(content, dict):
            value = {name: node(item, node, self) for name, item in content.items()}
        elif isinstance(content, list):
            value = [node(item, node, self) for item in content]
        self.__dict__ = {"_metadata": {"ref_type": dict}, "_parent": parent, key: value}


@pytest.fixture
def omega(monkeypatch):
    """Make objects that a pickle names as omegaconf's, although that package is missing when they are read."""
    module = ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (Node,), {"__module__": "omegaconf.dictconfig"})

    def save(path, content, config):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
            patch.setitem(sys.modules, "omegaconf.dictconfig", module)
            settings = {"config": module.DictConfig(config, module.DictConfig), "tokenizer": None}
            return saved(path, content | {"hyper_parameters": settings})

    return save


FORMS = {
    "state dict": lambda folder, state: saved(folder / "model.pt", state),
    "Lightning": lambda folder, state: saved(
        folder / "last.ckpt", {"state_dict": prefixed(state) | {"sampling_eps_min": torch.tensor(0.3)}, "epoch": 1}
    ),
    "compiled": lambda folder, state: saved(
        folder / "last.ckpt", {"state_dict": prefixed(state, "backbone._orig_mod.")}
    ),
    "safetensors": lambda folder, state: (save_file(state, folder / "m.safetensors"), folder / "m.safetensors")[1],
    "folder": lambda folder, state: hf_folder(folder / "hf", state),
    "pickled folder": lambda folder, state: pickled_folder(folder, state),
}


def pickled_folder(folder, state):
    saved(folder / "pytorch_model.bin", prefixed(state))
    (folder / "config.json").write_text(json.dumps({"config": hydra(), "vocab_size": VOCAB}))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_folded_weights_give_the_logits_of_the_dit(tmp_path, form):
    dit = DiT()
    official = open_official(FORMS[form](tmp_path, dit.state_dict()))
    model, weights = official.model, official.weights
    assert (official.source, official.mask_id, official.vocab_size) == ("weights", VOCAB - 1, VOCAB)
    assert official.block_size == (BLOCK if "folder" in form else None)
    assert official.max_position_embeddings == (LENGTH if "folder" in form else 1024)
    expected = named_tensors(model, vocab_rows=VOCAB, padded_rows=VOCAB, tied=False)
    assert dict(weights.shapes) == {tensor.name: tensor.shape for tensor in expected}
    read = {name: weights.read(name) for name in weights.shapes}
    assert all(read[n].shape == weights.shapes[n] and read[n].dtype == weights.dtypes[n] for n in read)

    folded = {name: tensor.double() for name, tensor in read.items()}
    noisy, clean = torch.randint(0, VOCAB, (2, 3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask, dit = attention_mask(BLOCK), dit.double()
    dit.rotary_emb.inv_freq = 10000 ** -(torch.arange(4).double() / 4)
    cases = [(torch.cat([noisy, clean], 1), mask, 2), (clean[:, :8], mask[LENGTH:, LENGTH:][:8, :8], 1)]
    for tokens, seen, halves in cases:
        with torch.no_grad():
            want, found = dit(tokens, seen, halves), plain_logits(folded, model, tokens, seen, halves)
        assert want.std() > 0.3
        assert (found - want).norm() / want.norm() < 1e-6


def test_the_dtype_of_the_file_is_kept(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in DiT().state_dict().items()}
    official = open_official(saved(tmp_path / "model.pt", state))
    assert official.model.num_attention_heads == HEADS
    assert {official.weights.read(name).dtype for name in official.weights.shapes} == {torch.bfloat16}


def test_the_moving_average_is_taken_where_there_is_one(tmp_path):
    state, average = DiT().state_dict(), DiT(seed=1)
    path = saved(tmp_path / "last.ckpt", {"state_dict": prefixed(state), "ema": averaged(average)})
    found = open_official(path)
    want = open_official(saved(tmp_path / "average.pt", average.state_dict()))
    assert (found.source, want.source) == ("ema", "weights")
    assert all(torch.equal(found.weights.read(name), want.weights.read(name)) for name in want.weights.shapes)


def test_a_moving_average_of_another_model_is_refused(tmp_path):
    ema = averaged(DiT())
    ema["shadow_params"][1] = torch.zeros(3)
    path = saved(tmp_path / "last.ckpt", {"state_dict": prefixed(DiT().state_dict()), "ema": ema})
    with pytest.raises(ValueError, match=r"sigma_map.mlp.0.weight \(3,\), not \(10, 256\); remove `ema`"):
        open_official(path)
    del ema["shadow_params"][1]
    saved(path, {"state_dict": prefixed(DiT().state_dict()), "ema": ema})
    with pytest.raises(ValueError, match=rf"has {len(ema['shadow_params'])} tensors, the model"):
        open_official(path)


def test_hyperparameters_of_a_lightning_checkpoint_are_read_without_their_packages(tmp_path, omega):
    state = {"state_dict": prefixed(DiT().state_dict())}
    official = open_official(omega(tmp_path / "last.ckpt", state, hydra()))
    assert (official.block_size, official.max_position_embeddings) == (BLOCK, LENGTH)
    assert "omegaconf" not in sys.modules
    whole = open_official(omega(tmp_path / "base.ckpt", state, hydra() | {"block_size": "${model.length}"}))
    assert whole.block_size == LENGTH
    mdlm = open_official(omega(tmp_path / "mdlm.ckpt", state, hydra(name="mdlm", cross_attn=False)))
    assert mdlm.block_size == LENGTH
    older = hydra()["model"]
    older = {"model": older, "parameterization": "subs", "time_conditioning": False, "backbone": "dit"}
    assert open_official(omega(tmp_path / "older.ckpt", state, older)).block_size == LENGTH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_conditioning": True}, "time_conditioning=true"),
        ({"parameterization": "sedd", "time_conditioning": True}, "parameterization=sedd"),
        ({"parameterization": "ar", "causal_attention": True}, "next-token"),
        ({"backbone": "dimamba"}, "backbone=dimamba"),
    ],
)
def test_variants_that_do_not_fold_are_refused_by_name(tmp_path, omega, changes, words):
    path = omega(tmp_path / "last.ckpt", {"state_dict": prefixed(DiT().state_dict())}, hydra(**changes))
    with pytest.raises(ValueError, match=words):
        open_official(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_conditioning": True}, "time_conditioning=true"),
        ({"causal": True}, "next-token"),
        ({"n_heads": 6}, "n_heads=6, and its tensors say 3"),
        ({"vocab_size": 20}, "vocab_size=20, and its tensors say 19"),
        ({"n_blocks": 3}, r"missing: blocks\.2\.norm1\.weight.* and 4 more"),
        ({"n_blocks": 1}, r"not part of the model: blocks\.1\."),
    ],
)
def test_a_config_json_that_says_otherwise_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        open_official(hf_folder(tmp_path / "hf", DiT().state_dict(), **changes))


def test_an_mdlm_folder_is_one_block(tmp_path):
    folder = hf_folder(tmp_path / "hf", DiT().state_dict())
    config = {k: v for k, v in HF_CONFIG.items() if k not in ("block_size", "cross_attn")} | {"model_type": "mdlm"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_official(folder).block_size == LENGTH


def test_bert_has_a_mask_of_its_own(tmp_path):
    state = DiT().state_dict()
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        state[name] = torch.zeros(30522, *state[name].shape[1:])
    assert open_official(saved(tmp_path / "lm1b.pt", state)).mask_id == 103


def test_a_text_begins_as_the_code_begins_its_sequences(tmp_path, omega):
    """Check GPT-2, whose end of text also begins texts, BERT with [CLS], and a configuration without the key."""
    from bd3_scale.convert.importer import plan_import

    sizes = {50258: (None, 50256), 30522: (102, 101)}
    for size, (eos_id, bos_id) in sizes.items():
        state = DiT().state_dict()
        for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
            state[name] = torch.zeros(size, *state[name].shape[1:])
        plan = plan_import(saved(tmp_path / f"{size}.pt", state), block_size=BLOCK, eos_id=eos_id)
        assert plan.vocabulary.bos_id == bos_id
    for ignored, begins in ((True, True), (False, False), (None, True)):
        changes = {} if ignored is None else {"ignore_bos": ignored}
        path = omega(tmp_path / f"{ignored}.ckpt", {"state_dict": prefixed(DiT().state_dict())}, hydra(**changes))
        assert open_official(path).begins_with_bos == begins


def test_missing_and_extra_tensors_are_named(tmp_path):
    state = DiT().state_dict()
    del state["blocks.1.mlp.2.bias"]
    state["blocks.0.lora.weight"] = torch.zeros(1)
    state["output_layer.linear.bias"] = torch.zeros(VOCAB + 1)
    state["blocks.0.norm1.weight"] = torch.ones(HIDDEN, dtype=torch.int8)
    with pytest.raises(ValueError, match="not all of one") as error:
        open_official(saved(tmp_path / "model.pt", state))
    for line in (
        "missing: blocks.1.mlp.2.bias",
        "not part of the model: blocks.0.lora.weight",
        "of another shape: output_layer.linear.bias (20,), not (19,)",
        "no floating-point numbers: blocks.0.norm1.weight",
    ):
        assert line in str(error.value)


def test_other_models_are_refused(tmp_path):
    state = DiT().state_dict()
    path = tmp_path / "model.pt"
    for content, words in (
        ({"model.embed_tokens.weight": torch.zeros(2, 2)}, "no matrix vocab_embed.embedding; it has model.embed"),
        ({"epoch": 3, "weights": [1]}, "holds epoch, weights"),
        ([1], "holds a list"),
        ({n: t for n, t in state.items() if "adaLN" not in n and "sigma" not in n}, "next-token"),
        ({n: t for n, t in state.items() if "inv_freq" not in n}, "its number of heads is unknown"),
        (state | {"rotary_emb.inv_freq": 500000 ** -(torch.arange(4) / 4)}, "base 10000"),
        (state | {"rotary_emb.inv_freq": torch.ones(5)}, "does not fit"),
        (state | prefixed(state), "two models"),
    ):
        with pytest.raises(ValueError, match=words):
            open_official(saved(path, content))


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_could_run_code_is_refused_and_not_run(tmp_path):
    touched = tmp_path / "touched"
    path = saved(tmp_path / "last.ckpt", {"state_dict": prefixed(DiT().state_dict()), "callbacks": Touch(touched)})
    with pytest.raises(ValueError, match=r"calls .*pathlib"):
        open_official(path)
    assert not touched.exists()


@pytest.mark.launch
def test_the_command_in_the_refusal_saves_what_can_be_imported(tmp_path):
    content = {"state_dict": prefixed(DiT().state_dict()), "ema": averaged(DiT()), "lr": Fraction(1, 3)}
    with pytest.raises(ValueError, match=r"fractions\.Fraction") as error:
        open_official(saved(tmp_path / "last.ckpt", content))
    command = shlex.split(str(error.value).splitlines()[-1])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert open_official(tmp_path / "weights.ckpt").source == "ema"


def test_damaged_files_are_told_apart(tmp_path):
    good = saved(tmp_path / "good.pt", DiT().state_dict()).read_bytes()
    bad = tmp_path / "bad.ckpt"
    torch.save(DiT().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for content, words in (
        (good[: len(good) // 2], "is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ((tmp_path / "old.pt").read_bytes(), "torch 1.6"),
        (b"", "is empty"),
        (b"hello, world", "neither a file of torch.save nor"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_official(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(ValueError, match=r"was not written by torch\.save"):
        open_official(bad)
    half = tmp_path / "half.safetensors"
    save_file(DiT().state_dict(), half)
    half.write_bytes(half.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        open_official(half)


def test_only_official_folders_are_taken_for_official(tmp_path):
    assert is_official(hf_folder(tmp_path / "hf", DiT().state_dict()))
    assert is_official(tmp_path / "hf" / "model.safetensors")
    assert not is_official(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "config": "x"}))
    assert not is_official(tmp_path)
    assert not is_official(tmp_path / "nothing")
