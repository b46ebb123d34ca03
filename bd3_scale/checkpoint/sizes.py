"""Check that a manifest's model fits the stored tensors, before memory is allocated by the manifest's numbers."""

from __future__ import annotations

from pathlib import Path

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.storage import read_index
from bd3_scale.recipe.moe_rules import mixture_problems


def check_sizes(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Check the shapes of a model's largest tensors against the index.

    Raises:
        ValueError: a tensor has another shape than the manifest's model, the index is damaged, or the manifest's
            mixture of experts breaks a rule.
    """
    model = manifest.model
    if problems := list(mixture_problems(model)):
        raise ValueError(f"checkpoint {checkpoint} has a manifest that describes no model: {'; '.join(problems)}")
    hidden, groups = model.hidden_size, model.query_groups
    qkv = groups * (model.num_attention_heads // groups + 2) * model.head_size
    gated = 2 if model.activation == "swiglu" else 1
    expected = {
        "embedding.word_embeddings.weight": [manifest.vocabulary.padded_size, hidden],
        "decoder.layers.self_attention.linear_qkv.weight": [model.num_layers, qkv, hidden],
    }
    if dense := model.dense_layers:
        expected["decoder.layers.mlp.linear_fc1.weight"] = [dense, gated * model.ffn_hidden_size, hidden]
    if (moe := model.moe) is not None:
        mixture, sparse = "decoder.layers.mlp", model.num_layers - dense
        expected[f"{mixture}.router.weight"] = [sparse, moe.num_experts, hidden]
        expected[f"{mixture}.experts.linear_fc1.weight"] = [sparse, moe.num_experts, 2, moe.ffn_hidden_size, hidden]
        if shared := moe.shared_ffn_hidden_size:
            expected[f"{mixture}.shared_experts.linear_fc1.weight"] = [sparse, 2 * shared, hidden]
    index = read_index(checkpoint)
    for name, shape in expected.items():
        entry = index.get(f"{manifest.weights_state}.{name}")
        if entry is None or entry.shape != shape:
            state = "is missing" if entry is None else f"has the shape {entry.shape}"
            raise ValueError(
                f"checkpoint {checkpoint} does not fit its manifest: {name} {state}, and the manifest's model has "
                f"{shape}"
            )
