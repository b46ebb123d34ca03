"""Run in a process of its own: exported folders loaded with transformers alone, beside what the native model gives."""

from __future__ import annotations

import sys

try:
    import torchvision  # noqa: F401
except Exception:  # noqa: BLE001  (one that was built for another torch breaks transformers)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

version, *files = sys.argv[1:]
assert transformers.__version__.startswith(f"{version}."), transformers.__version__
for file in files:
    expected = torch.load(file)
    folder = expected["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    ids = expected["ids"]
    with torch.no_grad():
        logits = model(ids).logits
    known = expected["logits"][..., :257]
    difference = float((logits[..., :257] - known).abs().max() / known.abs().max())
    assert difference < 1e-5, (folder, difference)
    for sample in expected["samples"]:
        prompt = ids[:1, : sample["length"]]
        found = model.generate(prompt, max_new_tokens=13, **sample["rule"])[0, sample["length"] :].tolist()
        found = found[: found.index(expected["eos"])] if expected["eos"] in found else found
        assert found == sample["tokens"], (folder, sample, found)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("Once").input_ids == list(b"Once")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (257, 256)
    print(folder, "equal", difference)
