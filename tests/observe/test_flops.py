"""Count FLOPs by the operators of the real graph, forward and backward, on tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.data.batch import Batch
from bd3_scale.diffusion.noise import draw_copies
from bd3_scale.diffusion.schedule import LINEAR
from bd3_scale.model.build import build_model
from bd3_scale.objective.inputs import corrupt, next_tokens
from bd3_scale.observe.flops import model_flops, peak_flops
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe
from bd3_scale.recipe.vocabulary import Vocabulary

CPU = torch.device("cpu")
SMALL = ModelRecipe(num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48)
# The shapes of the paper's small model and of a 1B one.
M110 = ModelRecipe(num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=2048)
B1 = ModelRecipe(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=8192)


def sequences(count: int, length: int) -> Batch:
    return Batch(
        ids=torch.arange(count),
        slots=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
        source_keys=torch.zeros(count, dtype=torch.int64),
        tokens=torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(0)),
        document_start=torch.zeros(count, length, dtype=torch.int32),
        positions=torch.arange(length).expand(count, -1),
        counted=torch.ones(count, length, dtype=torch.bool),
        shown=torch.zeros(count, length, dtype=torch.bool),
    )


def noisy(batch: Batch, block_size: int, copies: int = 1):
    position = torch.arange(batch.tokens.shape[1])
    starts = (position - position % block_size).expand(len(batch.ids), -1)
    noises = draw_copies(starts, copies=copies, schedule=LINEAR, seed=1, epoch=0, sample_ids=batch.ids)
    return corrupt(batch, noises, block_size, mask_id=59, device=CPU)


def count(groups, model: ModelRecipe, size: int, inputs, *, recompute: str = "none") -> int:
    """Return FLOPs of forward and backward; the attention's come from real spans, which cannot be fake tensors."""
    vocabulary = Vocabulary(size=size, eos_id=0, mask_id=59)
    with FakeTensorMode(allow_non_fake_inputs=True):
        how = {"dtype": torch.float32, "device": CPU, "recompute": (recompute, None)}
        (chunk,) = build_model(model, vocabulary, groups, seed=None, **how)
        with FlopCounterMode(display=False) as counter:
            chunk(inputs)[0].backward()
    return counter.get_total_flops()


def needed(model: ModelRecipe, size: int, inputs) -> int:
    noisy_rows = inputs.num_noisy * inputs.positions.numel()
    return model_flops(
        model,
        Vocabulary(size=size, eos_id=0, mask_id=59).padded_size,
        noisy_rows=noisy_rows,
        clean_rows=inputs.tokens.numel() - noisy_rows,
        noisy_pairs=inputs.noisy_pairs,
        clean_pairs=inputs.clean_pairs,
        head_rows=len(inputs.head_rows),
    )


def attention_again(model: ModelRecipe, inputs) -> int:
    """Return the FLOPs of the scores that attention's backward recomputes; model FLOPs do not count them."""
    last = inputs.noisy_pairs or inputs.clean_pairs
    pairs = (model.num_layers - 1) * (inputs.noisy_pairs + inputs.clean_pairs) + last
    return 2 * model.num_attention_heads * model.head_size * pairs


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("kind", ["two-stream", "two copies", "mdlm", "autoregressive"])
def test_the_formula_counts_what_the_graph_runs(groups, kind, activation):
    model = SMALL.model_copy(update={"activation": activation})
    batch = sequences(2, 32)
    inputs = {
        "two-stream": noisy(batch, 8),
        "two copies": noisy(batch, 8, copies=2),
        "mdlm": noisy(batch, 32),
        "autoregressive": next_tokens(batch, device=CPU),
    }[kind]
    ran = count(groups, model, 60, inputs)
    assert ran == needed(model, 60, inputs) + attention_again(model, inputs)


@pytest.mark.parametrize("kind", ["two-stream", "two copies", "autoregressive"])
@pytest.mark.parametrize(
    "moe",
    [
        MoeRecipe(num_experts=6, top_k=2, ffn_hidden_size=24),
        MoeRecipe(
            num_experts=8,
            top_k=3,
            ffn_hidden_size=20,
            shared_ffn_hidden_size=40,
            first_dense_layers=1,
            score="sigmoid",
            bias=True,
            groups=4,
            top_groups=2,
        ),
        MoeRecipe(num_experts=4, top_k=1, ffn_hidden_size=16, first_dense_layers=2, aux_loss=0.1, z_loss=0.1),
    ],
    ids=["softmax", "one dense, shared", "two dense, losses"],
)
def test_the_formula_counts_what_a_mixture_runs(groups, moe, kind):
    """Check a row's experts, the router and the shared expert; in the last layer, only for noisy rows."""
    model = SMALL.model_copy(update={"moe": moe})
    batch = sequences(2, 32)
    inputs = {
        "two-stream": noisy(batch, 8),
        "two copies": noisy(batch, 8, copies=2),
        "autoregressive": next_tokens(batch, device=CPU),
    }[kind]
    assert count(groups, model, 60, inputs) == needed(model, 60, inputs) + attention_again(model, inputs)


def test_each_saving_shows_in_the_graph(groups):
    """Check each against every row through every layer and the head: twice a next-token step's rows and head."""
    batch, block = sequences(2, 32), 8
    inputs = noisy(batch, block)
    rows, masked, pairs = 64, len(inputs.head_rows), 2 * (32 * 32 + 32 * block) // 2
    assert (inputs.noisy_pairs, inputs.clean_pairs) == (pairs, pairs)
    queries, keys, mlp = 2 * 32 * 2 * 32, 2 * 32 * 2 * 16, 2 * 32 * 3 * 48
    whole_layer = 2 * rows * (queries + keys + mlp) + 4 * 32 * 2 * pairs
    everything = 3 * (3 * whole_layer + 2 * rows * 2 * 32 * 128) + 3 * 2 * 32 * 2 * pairs
    unread_head = 3 * (2 * rows - masked) * 2 * 32 * 128
    unread_clean_rows = 3 * (rows * (queries + mlp) + 4 * 32 * pairs) + 2 * 32 * pairs
    assert count(groups, SMALL, 60, inputs) == everything - unread_head - unread_clean_rows
    assert noisy(batch, 32).num_streams == 1, "nothing reads a clean stream at L'=L"


def test_recomputation_runs_a_forward_more(groups):
    inputs = noisy(sequences(1, 32), 8)
    none, selective, full = (count(groups, SMALL, 60, inputs, recompute=r) for r in ("none", "selective", "full"))
    attention = 2 * attention_again(SMALL, inputs)
    head = 3 * len(inputs.head_rows) * 2 * 32 * 128
    layers = (none - head - attention_again(SMALL, inputs)) // 3
    assert selective == none + attention
    # torch ends a recomputation with the last tensor that backward needs: the last product of a layer is left out.
    last_products = 2 * 32 * 48 * (2 * 64 + 32)
    assert full in (none + layers, none + layers - last_products)


@pytest.mark.parametrize(
    ("model", "length", "size", "most", "most_a_copy"),
    [(M110, 1024, 50257, 1.55, 1.25), pytest.param(B1, 4096, 128256, 1.70, 1.32, marks=pytest.mark.slow)],
    ids=["110M", "1B"],
)
def test_a_step_against_next_token_training_of_the_same_model(groups, model, length, size, most, most_a_copy):
    batch = sequences(2, length)
    autoregressive = count(groups, model, size, next_tokens(batch, device=CPU))
    one, two = (count(groups, model, size, noisy(batch, 16, copies=copies)) for copies in (1, 2))
    assert one / autoregressive <= most
    assert two / 2 / autoregressive <= most_a_copy


def test_an_unknown_device_has_no_peak(monkeypatch):
    assert torch.cuda.is_available() or peak_flops(torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "Tesla T4": None}
    names |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA RTX A1000 Laptop GPU": None, "NVIDIA GB200": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops(torch.bfloat16) == peak
        assert peak_flops(torch.float32) is None
