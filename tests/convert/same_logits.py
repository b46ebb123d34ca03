"""Check in a new process that two exported folders, loaded with transformers alone, compute the same logits."""

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

ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
logits = []
for folder in sys.argv[1:]:
    # In the type of the scales, as engines run it: in fp32 the product of value and scale would not be rounded to it.
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits.append(model(ids).logits)
difference = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
assert difference < 1e-6, difference
print("equal", difference)
