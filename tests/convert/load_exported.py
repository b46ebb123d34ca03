"""Load exported folders with transformers alone, in a new process, and compare with the native model's results."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

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
        found = model.generate(prompt, max_new_tokens=13, do_sample=False, **sample["rule"])[
            0, sample["length"] :
        ].tolist()
        found = found[: found.index(expected["eos"])] if expected["eos"] in found else found
        assert found == sample["tokens"], (folder, sample, found)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("Once").input_ids == list(b"Once")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (expected["mask_id"], 256)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (256, "left")
    texts, greedy = ["Once upon", "A"], {"max_new_tokens": 13, "do_sample": False, "eos_token_id": []}
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), **greedy)[0].tolist() for text in texts]
    together = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), **greedy)
    assert together.tolist() == [alone[0], [256] * 8 + alone[1]]
    new = alone[1][1:]
    stop = next(token for token in new if token < 128)
    stopping = {"stop_strings": [chr(stop)], "tokenizer": tokenizer}
    stopped = model.generate(**tokenizer("A", return_tensors="pt"), **greedy, **stopping)
    assert stopped[0, 1:].tolist() == new[: new.index(stop) + 1]
    # transformers samples from all that the model predicts, as generation_config.json says.
    torch.manual_seed(0)
    drawn = model.generate(ids, max_new_tokens=13)
    torch.manual_seed(0)
    every = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert torch.equal(drawn, model.generate(ids, max_new_tokens=13, **every))
    assert not torch.equal(drawn, model.generate(ids, max_new_tokens=13, do_sample=False))
    write = pipeline("text-generation", model=folder, trust_remote_code=True, dtype=torch.float32)
    found = write(texts, batch_size=2, return_tensors=True, **greedy)
    assert [one["generated_token_ids"] for (one,) in found] == together.tolist()
    assert write("Once", max_new_tokens=5)[0]["generated_text"].startswith("Once")
    print(folder, "equal", difference)
