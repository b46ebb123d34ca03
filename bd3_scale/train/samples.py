"""Write texts with the model in the course of a training, from the prompts of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.writer import Writer
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.train.setup import Run, Training

# Seeds of other steps are so far away that no two texts share one.
_PROMPTS = 1 << 20


def check_prompts(run: Run) -> None:
    """Check the prompts of the recipe with the run's tokeniser. ValueError: one cannot be continued."""
    if not (prompts := run.recipe.evaluation.prompts):
        return
    tokenizer = load_tokenizer(run.folder / TOKENIZER).with_bos(run.data.vocabulary.bos_id)
    for prompt in prompts:
        ids = tokenizer.encode_prompt(prompt, gaps=False)
        if bad := [i for i in ids if not 0 <= i < run.data.vocabulary.size]:
            raise ValueError(f"evaluation.prompts: {prompt!r} has the ids {bad[:5]}, which the vocabulary lacks")


def write_samples(training: Training) -> list[dict[str, Any]]:
    """Return the text of each prompt with the weights as they are now; the same on all ranks (collective).

    They depend on the seed of the recipe, the step and the weights. Nothing of the training changes: sampling draws
    from generators of its own. The tensor-parallel ranks of the first replica write, and the others wait.
    """
    run, step = training.run, training.state.step
    prompts = run.recipe.evaluation.prompts
    if not prompts:
        return []
    found = _written(training, prompts, step) if run.groups.dp_cp.rank() == 0 else []
    return on_rank_zero(lambda: found)


def _written(training: Training, prompts: Sequence[str], step: int) -> list[dict[str, Any]]:
    run, (model,) = training.run, training.engine.chunks
    recipe, folder = run.recipe, run.folder / TOKENIZER
    writer = Writer(
        model,
        load_tokenizer(folder).with_bos(model.vocabulary.bos_id),
        block_size=recipe.diffusion.block_size,
        context=recipe.data.seq_len,
        eos_ids=(model.vocabulary.eos_id,),
        # A text that repeats itself is shown, too: it says how far the training is.
        least_entropy=lambda: 0.0,
        chat_template=folder,
    )
    seed = (recipe.seed + step * _PROMPTS) % (1 << 63)
    sampling = SamplingConfig(max_new_tokens=recipe.evaluation.prompt_tokens, seed=seed)
    return [
        {"step": step, "kind": "sample", "prompt": written.prompt, "text": written.text, "nfe": written.nfe}
        for written in writer.write(prompts, sampling)
    ]
