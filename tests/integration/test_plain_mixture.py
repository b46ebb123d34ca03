"""Compare the plain mixture of experts, the reference of every layout, with simpler code: row by row in float64, with
weights and losses from the papers' formulas.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bd3_scale.recipe.schema import MoeRecipe
from tests.integration import plain_model

X = 6
FORMS = {
    "softmax": MoeRecipe(num_experts=5, top_k=2, ffn_hidden_size=4),
    "softmax, scores as they are": MoeRecipe(num_experts=4, top_k=3, ffn_hidden_size=4, normalize_top_k=False),
    "sigmoid, groups, biases, shared": MoeRecipe(
        num_experts=8,
        top_k=3,
        ffn_hidden_size=4,
        shared_ffn_hidden_size=6,
        score="sigmoid",
        groups=4,
        top_groups=2,
        scale=2.5,
        bias=True,
    ),
    "sigmoid, one of all": MoeRecipe(num_experts=3, top_k=1, ffn_hidden_size=4, score="sigmoid", bias=True),
}


def weights_of(moe: MoeRecipe, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "mlp.router.weight": (moe.num_experts, X),
        "mlp.experts.linear_fc1.weight": (moe.num_experts, 2, moe.ffn_hidden_size, X),
        "mlp.experts.linear_fc2.weight": (moe.num_experts, X, moe.ffn_hidden_size),
    }
    if moe.shared_ffn_hidden_size:
        shapes["mlp.shared_experts.linear_fc1.weight"] = (2 * moe.shared_ffn_hidden_size, X)
        shapes["mlp.shared_experts.linear_fc2.weight"] = (X, moe.shared_ffn_hidden_size)
    found = {name: 0.6 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if moe.bias:
        found["mlp.router.expert_bias"] = 0.2 * torch.randn(moe.num_experts, generator=generator)
    return found


def row_by_row(x, w, moe):
    """Return the output of one row x [X]: every expert computes, and all but the chosen ones are multiplied by zero."""
    logits = torch.stack([sum(x[i] * w["mlp.router.weight"][e, i] for i in range(X)) for e in range(moe.num_experts)])
    score = logits.exp() / logits.exp().sum() if moe.score == "softmax" else 1 / (1 + (-logits).exp())
    by = score + w.get("mlp.router.expert_bias", 0)
    in_groups = by.view(moe.groups, -1)
    if moe.top_groups:
        kept = in_groups.topk(2, -1).values.sum(-1).topk(moe.top_groups).indices
        outside = torch.ones(moe.groups, dtype=torch.bool).index_fill(0, kept, False)
        by = in_groups.masked_fill(outside[:, None], -math.inf).flatten()
    chosen = by.topk(moe.top_k).indices
    share = torch.zeros_like(score).index_fill(0, chosen, 1) * score
    if moe.normalize_top_k and not (moe.score == "sigmoid" and moe.top_k == 1):
        share = share / share.sum()
    out = torch.zeros_like(x)
    for e in range(moe.num_experts):
        gate, up = (part @ x for part in w["mlp.experts.linear_fc1.weight"][e])
        wide = gate / (1 + (-gate).exp()) * up
        out = out + moe.scale * share[e] * (w["mlp.experts.linear_fc2.weight"][e] @ wide)
    if moe.shared_ffn_hidden_size:
        both = w["mlp.shared_experts.linear_fc1.weight"] @ x
        gate, up = both[: moe.shared_ffn_hidden_size], both[moe.shared_ffn_hidden_size :]
        out = out + w["mlp.shared_experts.linear_fc2.weight"] @ (gate / (1 + (-gate).exp()) * up)
    return out, set(chosen.tolist())


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_and_its_gradients_are_those_of_one_row_after_the_other(form: str) -> None:
    moe = FORMS[form]
    weights = weights_of(moe, 1)
    x = torch.randn(2, 9, X, generator=torch.Generator().manual_seed(2))
    ours = {name: value.clone().requires_grad_() for name, value in weights.items()}
    plain = {name: value.double().requires_grad_() for name, value in weights.items()}
    x_ours, x_plain = x.clone().requires_grad_(), x.double().requires_grad_()
    out, (logits, chosen, gap) = plain_model.mixture(x_ours, ours, moe)
    assert gap > 1e-6
    rows = [row_by_row(row, plain, moe) for row in x_plain.flatten(0, 1)]
    expected = torch.stack([row for row, _ in rows]).view_as(x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert [set(experts.tolist()) for experts in chosen.flatten(0, 1)] == [experts for _, experts in rows]
    torch.testing.assert_close(logits, x @ weights["mlp.router.weight"].t(), rtol=1e-5, atol=1e-5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    for name in ("x", *(name for name in weights if not name.endswith("bias"))):
        found, want = (x_ours, x_plain) if name == "x" else (ours[name], plain[name])
        assert want.grad.norm() > 0, name
        assert (found.grad - want.grad).norm() < 1e-5 * want.grad.norm(), name


@given(st.data())
def test_experts_are_chosen_as_a_search_through_all_choices_finds(data: st.DataObject) -> None:
    """Check that no other set is better: groups count by the sum of their two best experts, experts by value."""
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    moe = MoeRecipe(
        num_experts=groups * size, top_k=top_k, ffn_hidden_size=1, groups=groups, top_groups=top_groups, bias=True
    )
    values = data.draw(st.lists(st.floats(-2, 2), min_size=groups * size, max_size=groups * size))
    chosen, gap = plain_model.choose(values, moe)
    assume(gap > 0)
    two_best = {g: sum(sorted(values[g * size : (g + 1) * size])[-2:]) for g in range(groups)}
    inside = [g for g in range(groups) if sum(two_best[other] > two_best[g] for other in range(groups)) < top_groups]
    allowed = {e for e in range(groups * size) if e // size in inside}
    assert len(set(chosen)) == top_k
    assert set(chosen) == {e for e in allowed if sum(values[o] > values[e] for o in allowed) < top_k}
    assert [values[e] for e in chosen] == sorted((values[e] for e in chosen), reverse=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_of_balance_are_their_formulas(form: str) -> None:
    """Check an even spread, which costs 1 a layer, everything on one expert, and a loop over rows."""
    moe = FORMS[form]
    experts, k = moe.num_experts, moe.top_k
    even = torch.stack([(torch.arange(k) + row) % experts for row in range(2 * experts)])[None]
    flat = torch.zeros(1, 2 * experts, experts)
    auxiliary, z = plain_model.balance_losses([routed(flat, even, noisy=4)] * 3, moe)
    assert float(auxiliary) == pytest.approx(3)
    assert float(z) == pytest.approx(3 * math.log(experts) ** 2)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 7, experts, generator=generator)
    chosen = torch.rand(2, 7, experts, generator=generator).topk(k).indices
    expected_auxiliary = expected_z = 0.0
    for row_logits, row_experts in zip(logits.double().tolist(), chosen.tolist(), strict=True):
        share, times, squares = [0.0] * experts, [0] * experts, 0.0
        for row, went in zip(row_logits, row_experts, strict=True):
            scores = [math.exp(v) if moe.score == "softmax" else 1 / (1 + math.exp(-v)) for v in row]
            for e in range(experts):
                share[e] += scores[e] / sum(scores) / 7
                times[e] += went.count(e)
            squares += math.log(sum(map(math.exp, row))) ** 2
        expected_auxiliary += experts * sum(s * n / (7 * k) for s, n in zip(share, times, strict=True)) / 2
        expected_z += squares / 7 / 2
    auxiliary, z = plain_model.balance_losses([routed(logits, chosen, noisy=3)], moe)
    assert (float(auxiliary), float(z)) == pytest.approx((expected_auxiliary, expected_z), rel=1e-5)


def routed(logits, chosen, *, noisy: int) -> plain_model.Routed:
    return plain_model.Routed(logits[:, :noisy], logits[:, noisy:], chosen[:, :noisy], chosen[:, noisy:], 1.0)


def test_clean_rows_count_once_and_not_in_the_last_layer() -> None:
    """Check two noisy copies and one clean stream of two sequences of three tokens; with one block, only noisy rows."""
    moe = FORMS["softmax"]
    experts = [torch.randint(0, 5, (2, 6, 2), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for number in (1, 3):  # both copies see the same clean rows
        experts[number][:, 3:] = experts[number - 1][:, 3:]
    passes = [[(torch.zeros(2, 6, 5), experts[2 * layer + copy], 1.0) for layer in (0, 1)] for copy in (0, 1)]
    whole = plain_model.load(list(plain_model.rows_once(passes, 3, has_clean=True)), moe.num_experts)
    assert whole.sum(-1).tolist() == [[2 * 2 * 3 * 2, 2 * 3 * 2], [2 * 2 * 3 * 2, 0]]
    for layer in (0, 1):
        noisy = torch.cat([experts[2 * layer + copy][:, :3] for copy in (0, 1)])
        assert whole[layer, 0].tolist() == [int((noisy == e).sum()) for e in range(5)]
    assert whole[0, 1].tolist() == [int((experts[0][:, 3:] == e).sum()) for e in range(5)]
    alone = plain_model.load(list(plain_model.rows_once(passes, 3, has_clean=False)), moe.num_experts)
    assert torch.equal(alone[:, 0], whole[:, 0])
    assert not alone[:, 1].any()


def test_biases_move_by_the_rate_towards_an_even_load() -> None:
    moe = FORMS["softmax"].model_copy(update={"bias_update_rate": 0.25})
    counts = torch.tensor([[[4, 0, 2, 1, 3], [0, 0, 0, 3, 2]]])
    assert plain_model.moved(torch.zeros(1, 5), counts, moe).tolist() == [[-0.25, 0.25, 0.25, -0.25, -0.25]]
