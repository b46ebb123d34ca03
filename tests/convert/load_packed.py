"""Load a folder of packed weights in a new process, with transformers and compressed-tensors alone."""

from __future__ import annotations

import sys

try:
    import torchvision  # noqa: F401
except Exception:  # noqa: BLE001  (one that was built for another torch breaks transformers)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None

import torch
from transformers import AutoModelForCausalLM

folder, file = sys.argv[1:]
expected = torch.load(file)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    found = model(expected["ids"]).logits
difference = float((found - expected["logits"]).abs().max() / expected["logits"].abs().max())
assert difference < 1e-6, difference
print("equal", difference)
