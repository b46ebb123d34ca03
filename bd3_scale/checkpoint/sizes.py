"""Whether a manifest's model is of the tensors beside it, asked before a model is made of its numbers."""

from __future__ import annotations

from pathlib import Path

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.storage import read_index


def check_sizes(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Raise ValueError where a tensor of the model has another shape than the manifest's, or the index is damaged."""
    model = manifest.model
    hidden, groups = model.hidden_size, model.query_groups
    qkv = groups * (model.num_attention_heads // groups + 2) * model.head_size
    mlp = model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1)
    expected = {
        "embedding.word_embeddings.weight": [manifest.vocabulary.padded_size, hidden],
        "decoder.layers.self_attention.linear_qkv.weight": [model.num_layers, qkv, hidden],
        "decoder.layers.mlp.linear_fc1.weight": [model.num_layers, mlp, hidden],
    }
    index = read_index(checkpoint)
    for name, shape in expected.items():
        entry = index.get(f"{manifest.weights_state}.{name}")
        if entry is None or entry.shape != shape:
            found = "is missing" if entry is None else f"has the shape {entry.shape}"
            raise ValueError(
                f"checkpoint {checkpoint} is not of its manifest: {name} {found}, and {shape} is the manifest's"
            )
