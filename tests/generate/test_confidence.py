"""Compare `bd3_scale.generate.draw` with plain numpy, and check that a checkpoint follows it natively and exported."""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from bd3_scale.checkpoint.model import open_model
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.generate.draw import Drawing
from bd3_scale.observe.libraries import without_broken_torchvision
from tests.convert.models import BYTES, LLAMA_SHAPE, QWEN_SHAPE, native_checkpoint
from tests.generate.sampling import generate

with without_broken_torchvision():
    from bd3_scale.convert.remote_code import generation_bd3

K = 4
TEXT = list(b"Once upon a time")
TRUNCATIONS = list(itertools.product((None, 1, 3), (1.0, 0.9, 0.37, 1e-9)))
FORBIDDEN = 4


def random_logits(rows: int) -> torch.Tensor:
    """Draw coarse logits, so that many are equal; one token is never drawn."""
    logits = torch.randint(-6, 7, (rows, 9), generator=torch.Generator().manual_seed(1)) / 2
    logits[:, FORBIDDEN] = float("-inf")
    return logits


def oracle(logits: list[float], temperature: float, top_k: int | None, top_p: float, uniform: float):
    """Return token, confidence and entropy of one position, by the definition in plain numpy."""
    scaled = np.array(logits, dtype=np.float64) / (temperature or 1.0)
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    ranked = sorted(range(len(logits)), key=lambda i: (-shares[i], i))
    inside = shares[shares > 0]
    entropy = -(inside * np.log(inside)).sum()
    if temperature == 0:
        return ranked[0], shares[ranked[0]], entropy
    ranked = ranked[:top_k]
    total, kept, before = sum(shares[i] for i in ranked), [], 0.0
    for token in ranked:
        if top_p == 1 or before < top_p:
            kept.append(token)
        before += shares[token] / total
    reached, target = 0.0, uniform * sum(shares[i] for i in kept)
    for token in sorted(kept):
        reached += shares[token]
        if reached > target:
            break
    return token, shares[token], entropy


@pytest.mark.parametrize("temperature", [0, 0.7, 1, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_tokens_confidence_and_entropy_are_those_of_plain_numpy(temperature, top_k, top_p):
    logits = random_logits(200)
    uniforms = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn, confidence, entropy = Drawing(temperature, top_k, top_p).draw(logits, uniforms)
    rows = zip(logits.tolist(), uniforms.tolist(), strict=True)
    expected = [oracle(row, temperature, top_k, top_p, uniform) for row, uniform in rows]
    tokens, *numbers = zip(*expected, strict=True)
    assert drawn.tolist() == list(tokens)
    assert confidence.dtype == entropy.dtype == torch.float64
    for found, wanted in zip((confidence, entropy), numbers, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.7, 1])
@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_exported_code_draws_from_the_same_distributions_bitwise(temperature, top_k, top_p):
    logits, native = random_logits(200), Drawing(temperature, top_k, top_p)
    rule = exported_rule(temperature, top_k, top_p)
    drawn, confidence = rule.draw(logits[None], torch.Generator().manual_seed(3))
    shares = Drawing(temperature).distribution(logits)
    assert torch.equal(confidence[0], shares.gather(-1, drawn[0][:, None])[:, 0])
    ranked, ids = generation_bd3.truncate(shares, top_k, top_p)
    kept = native.distribution(logits)
    assert torch.equal(torch.zeros_like(ranked).scatter_(-1, ids, ranked), kept)
    assert (kept.gather(-1, drawn[0][:, None]) > 0).all()
    if top_k == 1 or top_p < 0.1:
        tokens, sure, _ = native.draw(logits, torch.full((200,), 0.5).double())
        assert torch.equal(drawn[0], tokens)
        assert torch.equal(confidence[0], sure)


def exported_rule(temperature: float, top_k: int | None, top_p: float | None) -> generation_bd3.Unmasking:
    return generation_bd3.Unmasking(K, K, "dynamic", 0.9, temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(None, 0.5, 4), (None, 0.51, 5), (None, 0.125, 1), (4, 0.5, 2), (4, 1.0, 4), (2, 0.5, 1)],
)
def test_a_token_before_which_the_mass_is_top_p_is_left_out(top_k, top_p, kept):
    """Check eight equal tokens, whose sums are exact; the smallest ids stay."""
    logits = torch.zeros(1, 9)
    logits[0, FORBIDDEN] = float("-inf")
    shares = Drawing().distribution(logits)
    ranked, ids = generation_bd3.truncate(shares, top_k, top_p)
    for found in (
        Drawing(1.0, top_k, top_p).distribution(logits),
        torch.zeros_like(ranked).scatter_(-1, ids, ranked),
    ):
        allowed = [token for token in range(9) if token != FORBIDDEN]
        assert found[0].nonzero()[:, 0].tolist() == allowed[:kept]
        assert found[0, 0] == 1 / kept


@pytest.mark.parametrize("temperature", [0, 1])
def test_of_equal_tokens_the_smallest_id_is_taken(temperature):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 3.0]])
    native = Drawing(temperature, 1).draw(logits, torch.tensor([0.999]).double())[0]
    exported = exported_rule(temperature, 1, None).draw(logits[None], None)[0]
    assert (native.tolist(), exported.tolist()) == ([1], [[1]])


@pytest.fixture(scope="module", params=["sdar", "bd3"])
def both(request, tmp_path_factory):
    """Return one checkpoint's native model, and the model that its export's own code loads."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    shape = {"sdar": QWEN_SHAPE, "bd3": LLAMA_SHAPE}[kind]
    checkpoint = native_checkpoint(folder / "native", shape, BYTES, block_size=K)
    run_export(plan_export(checkpoint), folder / "exported", check=False)
    package = ModuleType(f"exported_{kind}")
    package.__path__ = [str(folder / "exported")]
    with pytest.MonkeyPatch.context() as patch, without_broken_torchvision(), open_model(checkpoint) as (model, _, _):
        patch.setitem(sys.modules, package.__name__, package)
        code = importlib.import_module(f"{package.__name__}.modeling_{kind}")
        exported = getattr(code, f"{ {'sdar': 'SDAR', 'bd3': 'Bd3'}[kind] }ForCausalLM")
        yield model, exported.from_pretrained(folder / "exported", dtype=torch.float32).eval()


def written(both, prompt: list[int], **how) -> list[tuple[list[int], int]]:
    """Return tokens and denoising passes, natively and by the export."""
    model, exported = both
    sample = generate(model, prompt, block_size=K, max_new_tokens=22, min_entropy=0.0, **how)
    passes = []

    def count(module, args, given, output):
        passes.append(given.get("store_kv", True))

    hook = exported.model.register_forward_hook(count, with_kwargs=True)
    how = {key: value for key, value in how.items() if value is not None}
    found = exported.generate(torch.tensor([prompt]), max_new_tokens=22, block_size=K, **how)[0, len(prompt) :].tolist()
    hook.remove()
    found = found[: found.index(BYTES.eos_id)] if BYTES.eos_id in found else found
    return [(sample.tokens, sample.nfe), (found, passes.count(False))]


DETERMINISTIC = {"greedy": {"temperature": 0.0}, "top-1": {"temperature": 1.0, "top_k": 1}}
RULES = [
    *({"unmasking": "static", "steps": steps} for steps in (None, 1, 2, 3)),
    *({"unmasking": "dynamic", "threshold": threshold} for threshold in (0.05, 0.1, 0.2, 0.5)),
    {"unmasking": "dynamic", "threshold": 0.1, "steps": 2},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("how", DETERMINISTIC)
def test_a_checkpoint_writes_alike_natively_and_exported(both, how, rule):
    for length in (3, 8, 10):
        native, exported = written(both, TEXT[:length], **DETERMINISTIC[how], **rule)
        assert native == exported


@pytest.mark.parametrize("how", [*DETERMINISTIC.values(), {"temperature": 0.5, "top_p": 1e-9}], ids=str)
def test_confidence_knows_neither_top_k_nor_top_p(both, how):
    """Check that a draw with one outcome is no more confident: passes grow with the threshold, up to one a token."""
    nfes = [written(both, TEXT[:8], **how, unmasking="dynamic", threshold=threshold) for threshold in (1e-3, 0.15, 1.0)]
    assert all(native == exported for native, exported in nfes)
    few, some, most = (native[1] for native, _ in nfes)
    assert few == 6
    assert few < some < most == 24


@pytest.mark.parametrize(("bound", "least", "most"), [(0.0, K, K), (8.0, 1.1, K - 0.1), (1e9, 1, 1)])
def test_the_entropy_bound_knows_neither_top_k_nor_top_p(both, bound, least, most):
    how = {"block_size": K, "max_new_tokens": 22, "min_entropy": 0.0, "unmasking": "entropy", "threshold": bound}
    greedy = generate(both[0], TEXT, temperature=0, **how)
    assert generate(both[0], TEXT, temperature=1.0, top_k=1, **how) == greedy
    assert generate(both[0], TEXT, temperature=1.0, top_p=1e-9, **how) == greedy
    # The prompt is read in one pass, and all blocks but the last are stored with one pass each.
    assert least <= greedy.nfe / greedy.cache_passes <= most
