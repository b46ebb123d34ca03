"""Compare with what the official SDAR-MoE and LLaDA2-MoE code computes with small random models, in fp32 on a CPU.

The repository does not contain the reference values. $BD3_SCALE_REFERENCE names a folder with the model folders
`sdar_moe_tiny` and `llada2_moe_tiny`, which each have a `golden.npz`; without it these tests are skipped.

Legend: L tokens, of which the last K are a block, V ids, n layers with experts, E experts, k for a row, X hidden size.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.model import open_model
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.names import named_tensors
from bd3_scale.model.rows import ModelInputs
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.observe.libraries import without_broken_torchvision
from tests.convert.models import tensors
from tests.generate.sampling import generate
from tests.support.caches import read

REFERENCE = Path(os.environ.get("BD3_SCALE_REFERENCE", "none"))
pytestmark = pytest.mark.skipif(
    not (REFERENCE / "sdar_moe_tiny").is_dir(),
    reason="BD3_SCALE_REFERENCE names no folder with values of official code",
)
K, MASK, V = 4, 259, 260
NEW = 2 * K + 2
# LLaDA2's config.json does not say these.
UNSAID: dict[str, dict[str, int]] = {"sdar_moe_tiny": {}, "llada2_moe_tiny": {"mask_id": MASK, "block_size": K}}
FORMATS = {"sdar_moe_tiny": "SDARMoeForCausalLM", "llada2_moe_tiny": "LLaDA2MoeModelLM"}
PROMPTS = ("m", "t1", "t2", "tm", "one", "short")
RULES = {f"st{steps}": {"unmasking": "static", "steps": steps} for steps in (4, 2, 1)} | {
    f"dy{steps}": {"unmasking": "dynamic", "steps": steps, "threshold": 0.5} for steps in (4, 2)
}


@dataclass
class Case:
    """A model of the official code: its folder, its values, and what was imported from it."""

    name: str
    folder: Path
    values: dict[str, Any]
    checkpoint: Path
    model: BlockDiffusionTransformer

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.values[name])

    def ids(self, name: str) -> Tensor:
        return self.tensor(name).long()[None]


@pytest.fixture(scope="module", params=list(UNSAID))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder, checkpoint = REFERENCE / request.param, tmp_path_factory.mktemp("imported") / request.param
    run_import(plan_import(folder, **UNSAID[request.param]), checkpoint)
    with open_model(checkpoint, torch.float32) as (model, _, _), np.load(folder / "golden.npz") as values:
        yield Case(request.param, folder, dict(values), checkpoint, model)


def close(found: Tensor, expected: Tensor, *, without_mask: bool = True) -> None:
    """Check that logits agree within 1e-4; a native model gives the mask no logit."""
    kept = torch.arange(expected.shape[-1]) != (MASK if without_mask else -1)
    torch.testing.assert_close(found[..., : len(kept)][..., kept], expected[..., kept], rtol=0, atol=1e-4)


def clean_logits(model: BlockDiffusionTransformer, ids: Tensor) -> Tensor:
    length = ids.shape[1]
    spans = make_spans(torch.zeros(1, length, dtype=torch.int32), K)
    with torch.no_grad():
        return model.clean_logits(ids, torch.arange(length)[None], spans)[0]


def doubled(tokens: Tensor, documents: list[int]) -> ModelInputs:
    """Return noisy and clean rows [1, 2L] of documents of the given lengths; the head reads all noisy rows."""
    length = tokens.shape[1] // 2
    starts = [sum(documents[:index]) for index, size in enumerate(documents) for _ in range(size)]
    positions = torch.tensor([place - start for place, start in enumerate(starts)])
    spans, rows = make_spans(torch.tensor([starts], dtype=torch.int32), K), torch.arange(length)
    return ModelInputs(tokens, positions[None], spans, 1, rows, rows, torch.ones(length), 0, 0)


class Watched:
    """The input, routing and output of each mixture, recorded in passes under a `with`."""

    def __init__(self, model: BlockDiffusionTransformer) -> None:
        self.mixtures = list(model.mixtures.values())
        self.inputs: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Watched:
        def keep(mixture: Any, args: tuple[Any, ...], output: Tensor) -> None:
            self.inputs.append(args[0].flatten(0, 1))
            self.outputs.append(output.flatten(0, 1))

        def keep_routing(router: Any, args: tuple[Any, ...], routing: Any) -> None:
            self.experts.append(routing.experts)
            self.weights.append(routing.weights)

        self.hooks = [m.register_forward_hook(keep) for m in self.mixtures]
        self.hooks += [m.router.register_forward_hook(keep_routing) for m in self.mixtures]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def same_routing(watched: Watched, experts: Tensor, weights: Tensor | None = None) -> None:
    """Check that both choose the same sets of experts with the same weights; in the last layer, only for rows routed
    here."""
    for layer, found in enumerate(watched.experts):
        found, order = found.sort(-1)
        expected, their_order = experts[layer, : len(found)].long().sort(-1)
        assert torch.equal(found, expected)
        if weights is not None:
            expected_weights = weights[layer, : len(found)].gather(-1, their_order)
            torch.testing.assert_close(watched.weights[layer].gather(-1, order), expected_weights, rtol=0, atol=1e-5)


def test_clean_text_goes_to_the_same_experts(case: Case) -> None:
    with Watched(case.model) as watched:
        close(clean_logits(case.model, case.ids("clean_ids")), case.tensor("clean_logits"))
    assert len(watched.experts) == len(case.values["clean_experts"])
    same_routing(watched, case.tensor("clean_experts"), case.tensor("clean_expert_weights"))
    for layer, (before, after) in enumerate(zip(watched.inputs, watched.outputs, strict=True)):
        close(before, case.tensor("clean_moe_in")[layer], without_mask=False)
        close(after, case.tensor("clean_moe_out")[layer], without_mask=False)


@pytest.mark.parametrize("which", ["all", "part"])
def test_a_masked_block_with_and_without_a_cache(case: Case, which: str) -> None:
    ids = case.ids(f"masked_{which}_ids")
    with Watched(case.model) as watched:
        close(clean_logits(case.model, ids)[-K:], case.tensor(f"masked_{which}_nocache_logits"))
    watched.experts = [experts[-K:] for experts in watched.experts]
    same_routing(watched, case.tensor(f"masked_{which}_experts"))
    prefix = ids.shape[1] - K
    cache = case.model.new_cache(1, ids.shape[1])
    with torch.no_grad():
        read(case.model, ids[:, :prefix], K, cache)
        found = case.model.decode(ids[:, prefix:], torch.arange(prefix, ids.shape[1])[None], cache)[0]
    close(found, case.tensor(f"masked_{which}_cache_logits"))
    if which == "part":
        return
    for layer in range(case.model.recipe.num_layers):
        for letter, kept in zip("kv", cache.of_layer(layer), strict=True):
            expected = case.tensor(f"cache_{letter}{layer}").transpose(0, 1)
            if letter == "k" and case.name.startswith("llada2"):
                # Its first half of a head turns, in pairs of two quarters; here every pair is of two halves.
                expected = expected.unflatten(-1, (2, 2, 4)).flatten(-3, -2)[..., [0, 2, 1, 3], :].flatten(-2)
            torch.testing.assert_close(kept[0, :prefix], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", ["train", "pack"])
def test_noisy_rows_beside_clean_ones(case: Case, which: str) -> None:
    if which == "train":
        tokens = torch.cat([case.ids("train_xt"), case.ids("train_x0")], 1)
        documents = [tokens.shape[1] // 2]
    else:
        ids, noisy = case.ids("pack_concat_ids"), case.tensor("pack_is_noisy")
        # In the official code, a document's clean tokens follow its noisy ones.
        tokens, documents = torch.cat([ids[:, noisy], ids[:, ~noisy]], 1), case.values["pack_doc_lens"].tolist()
    with torch.no_grad(), Watched(case.model) as watched:
        found = case.model.head_logits(doubled(tokens, documents))
    close(found, case.tensor(f"{which}_noisy_logits"))
    if which == "train":
        same_routing(watched, case.tensor("train_experts"), case.tensor("train_expert_weights"))


def test_gradients_of_routers_and_experts(case: Case) -> None:
    model, clean, noisy = case.model, case.ids("train_x0"), case.ids("train_xt")
    hidden = model.head_inputs(doubled(torch.cat([noisy, clean], 1), [clean.shape[1]]))
    # The official softmax includes the mask.
    logits = (hidden @ model.output_layer.weight.t())[:, :V]
    masked = noisy[0] == MASK
    loss = torch.nn.functional.cross_entropy(logits[masked], clean[0, masked])
    assert loss.item() == pytest.approx(float(case.values["train_ce"]), abs=1e-5)
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    style = "llada2" if case.name.startswith("llada2") else "qwen3"
    named = {t.name: t for t in named_tensors(model.recipe, vocab_rows=V, padded_rows=384, tied=False, style=style)}
    names = [name.removeprefix("grad:") for name in case.values if name.startswith("grad:")]
    assert len(names) == 5
    for name in names:
        tensor, layer = named[name], int(name.split(".")[2])
        gradient = gradients[tensor.key.replace("layers.", f"layers.{layer}.")]
        # The boxes are those of a tensor of all layers; this gradient is of one, which takes the place of the first
        # axis.
        parts = [gradient[None][tuple(slice(o, o + s) for o, s in zip((0, *offset[1:]), size, strict=True))]
                 for offset, size in tensor.boxes]  # fmt: skip
        found, expected = tensor.join(parts), case.tensor(f"grad:{name}")
        assert (found - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_gives_its_tokens(case: Case, prompt: str, rule: str) -> None:
    text = case.values[f"prompt_{prompt}"].tolist()
    expected = case.values[f"ev{rule}_{prompt}.out"].tolist()
    how = {"max_new_tokens": len(expected) - len(text), "temperature": 0.0, "min_entropy": 0.0, "eos_ids": ()}
    found = generate(case.model, text, block_size=K, **how, **RULES[rule])
    assert [*text, *found.tokens] == expected


@pytest.fixture(scope="module")
def exported(case: Case) -> Iterator[Any]:
    """Return the model by the code of its export, which a new process has loaded before."""
    folder = case.checkpoint.parent / f"{case.name}_out"
    run_export(plan_export(case.checkpoint), folder)
    before, after = tensors(case.folder), tensors(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    package = ModuleType(folder.name)
    package.__path__ = [str(folder)]
    module = "modeling_sdar_moe" if case.name.startswith("sdar") else "modeling_llada2_moe"
    with pytest.MonkeyPatch.context() as patch, without_broken_torchvision():
        patch.setitem(sys.modules, package.__name__, package)
        code = importlib.import_module(f"{folder.name}.{module}")
        yield getattr(code, FORMATS[case.name]).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
def test_the_code_of_an_export_computes_the_same(case: Case, exported: Any) -> None:
    with torch.no_grad():
        close(exported(case.ids("clean_ids")).logits[0], case.tensor("clean_logits"), without_mask=False)
        for which in ("all", "part"):
            ids = case.ids(f"masked_{which}_ids")
            expected = case.tensor(f"masked_{which}_nocache_logits")
            close(exported(ids).logits[0, -K:], expected, without_mask=False)
            _, cache = exported(ids[:, :-K], use_cache=True, return_dict=False)
            found = exported(ids[:, -K:], past_key_values=cache, store_kv=False).logits[0]
            close(found, case.tensor(f"masked_{which}_cache_logits"), without_mask=False)


@pytest.mark.slow
def test_the_code_of_an_export_writes_the_same(case: Case, exported: Any) -> None:
    for prompt in PROMPTS:
        for rule, options in RULES.items():
            text = case.ids(f"prompt_{prompt}")
            expected = case.values[f"ev{rule}_{prompt}.out"].tolist()
            length = {"max_new_tokens": len(expected) - text.shape[1], "do_sample": False, "eos_token_id": []}
            assert exported.generate(text, **length, **options)[0].tolist() == expected, (prompt, rule)
