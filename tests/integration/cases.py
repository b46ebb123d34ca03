"""Define models, batches and layouts of the parity tests, which are computed by plain PyTorch and on ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bd3_scale.diffusion.noise import draw_embedding_noise
from bd3_scale.model.build import Chunks, build_model
from bd3_scale.model.rows import NOISE_ROWS
from bd3_scale.model.transformer import noise_table
from bd3_scale.parallel.groups import ProcessGroups
from bd3_scale.recipe.schema import (
    DataRecipe,
    DiffusionRecipe,
    ModelRecipe,
    MoeRecipe,
    OptimizerRecipe,
    ParallelRecipe,
    Recipe,
    TrainRecipe,
)
from bd3_scale.recipe.vocabulary import Vocabulary

LENGTH, BATCH, STEPS = 64, 8, 3
VOCABULARY = Vocabulary(size=60, eos_id=0, mask_id=57)  # ids 58 and 59 are clean: the mask need not be the last

QWEN = ModelRecipe(
    num_layers=4, hidden_size=48, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, init_std=0.2
)
WIDE = QWEN.model_copy(update={"num_query_groups": 4})
OFFICIAL = ModelRecipe(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=2,
    head_dim=24,
    ffn_hidden_size=64,
    activation="gelu_tanh",
    normalization="layernorm",
    norm_bias=True,
    qk_norm=False,
    mlp_bias=True,
    attention_bias=True,
    head_bias=True,
    init_std=0.2,
)
TIED = WIDE.model_copy(update={"tie_embeddings": True, "activation": "gelu", "normalization": "layernorm"})
# Of its three layers with experts, each pipeline stage has one, and each of two virtual stages except the first.
MOE = QWEN.model_copy(
    update={
        "moe": MoeRecipe(
            num_experts=8,
            top_k=2,
            ffn_hidden_size=24,
            shared_ffn_hidden_size=16,
            first_dense_layers=1,
            bias=True,
            bias_update_rate=0.02,
            aux_loss=0.3,
            z_loss=0.01,
        )
    }
)
SIGMOID = QWEN.model_copy(
    update={
        "rotary_fraction": 0.5,
        "moe": MoeRecipe(
            num_experts=12,
            top_k=3,
            ffn_hidden_size=16,
            shared_ffn_hidden_size=32,
            first_dense_layers=1,
            score="sigmoid",
            groups=4,
            top_groups=2,
            scale=2.5,
            bias=True,
            bias_update_rate=0.02,
        ),
    }
)
# Every layer has experts, and their scores are not normalised.
PURE = QWEN.model_copy(
    update={"moe": MoeRecipe(num_experts=4, top_k=2, ffn_hidden_size=24, normalize_top_k=False, z_loss=0.01)}
)
# It has so few elements that rounding changes the sign of no Lion update.
SMALL = ModelRecipe(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24, init_std=0.2)
RAGGED = [7, 1, 56]  # document lengths: ragged last blocks, and a document shorter than a block
ALIGNED = [16, 8, 40]  # whole blocks of 8, as prepared data have


@dataclass(frozen=True)
class Case:
    """A model and its options. `unchosen` is an expert of every layer whose bias is so low at first that no row ever
    goes to it; `seed` gives batches in which rounding decides no choice of an expert.
    """

    model: ModelRecipe
    block_size: int
    documents: list[int]
    copies: int = 1
    complementary: bool = False
    mask_noise_std: float = 0.0
    objective: str = "block_diffusion"
    steps: int = STEPS
    unchosen: int | None = None
    seed: int = 0


CASES = {
    "ragged": Case(QWEN, 8, RAGGED),
    "packed": Case(QWEN, 8, ALIGNED),
    "wide": Case(WIDE, 8, ALIGNED),
    "official": Case(OFFICIAL, 4, [LENGTH]),
    "tied": Case(TIED, 8, ALIGNED),
    "autoregressive": Case(QWEN, 1, [LENGTH]),
    "mdlm": Case(QWEN, LENGTH, ALIGNED),
    "small": Case(SMALL, 8, ALIGNED),
    "two-copies": Case(QWEN, 8, ALIGNED, copies=2),
    "next-token": Case(QWEN, 1, RAGGED, objective="next_token"),
    "score-entropy": Case(WIDE, 8, ALIGNED, objective="score_entropy"),
    "mask-noise": Case(QWEN, 8, ALIGNED, copies=2, mask_noise_std=0.3),
    "complementary": Case(QWEN, 8, ALIGNED, copies=2, complementary=True),
    "moe": Case(MOE, 8, ALIGNED, steps=5, seed=3),
    "moe-sigmoid": Case(SIGMOID, 8, ALIGNED, steps=5, seed=3),
    "moe-two-copies": Case(MOE, 8, ALIGNED, copies=2, steps=5, unchosen=5, seed=12),
    "moe-mdlm": Case(SIGMOID, LENGTH, ALIGNED, steps=5, unchosen=2),
    "moe-next-token": Case(PURE, 1, RAGGED, objective="next_token"),
}


# `oracle.settings` has the same groups by hand; on two stages, no stage has tensors of all groups.
_GROUPS = (
    {"match": "*layernorm*", "lr_scale": 2, "weight_decay": 0.05},
    {"match": "embedding.*", "lr_scale": 0.3},
    {"match": "*.linear_fc?.weight", "weight_decay": 0.3},
    {"match": "decoder.final_*", "lr_scale": 0.5},
)
OPTIMIZERS: dict[str, dict] = {
    "adamw": {"eps": 1e-4},
    "groups": {"eps": 1e-4, "groups": _GROUPS},
    "lion": {"family": "lion", "betas": (0.9, 0.99), "groups": _GROUPS},
}


@dataclass(frozen=True)
class Layout:
    """A layout of ranks. `core` ones are part of every test run, not only of the whole matrix."""

    world_size: int
    case: str = "packed"
    parallel: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    optimizer: str = "adamw"
    core: bool = False

    @property
    def micro_batch_size(self) -> int:
        return self.train.get("micro_batch_size", 1)

    @property
    def repeats(self) -> int:
        """Return the number of runs; interleaved schedules run several times, since messages may overtake each
        other."""
        return 5 if self.parallel.get("virtual_pipeline", 1) > 1 else 1


def _layouts() -> dict[str, Layout]:
    tp2, pp2, cp2 = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
    sp2, vp2 = {**tp2, "sequence": True}, {**pp2, "virtual_pipeline": 2}
    full, selective = {"recompute": "full"}, {"recompute": "selective"}
    return {
        "one": Layout(1, "ragged", core=True),
        "one official": Layout(1, "official"),
        "one tied": Layout(1, "tied"),
        "one autoregressive": Layout(1, "autoregressive"),
        "one mdlm": Layout(1, "mdlm"),
        "one two-copies": Layout(1, "two-copies"),
        "one complementary": Layout(1, "complementary"),
        "one next-token": Layout(1, "next-token"),
        "one score-entropy": Layout(1, "score-entropy"),
        "one mask-noise": Layout(1, "mask-noise"),
        "one recompute-full": Layout(1, "ragged", train=full),
        "one recompute-selective": Layout(1, "ragged", train=selective),
        "one recompute-full-2": Layout(1, "ragged", train={**full, "recompute_layers": 2}),
        "one offload": Layout(1, parallel={"offload_optimizer": True}),
        "tp2": Layout(2, "official", tp2),
        "tp2 sp": Layout(2, "official", sp2, core=True),
        "tp2 sp mdlm": Layout(2, "mdlm", sp2),
        "tp2 sp two-copies": Layout(2, "two-copies", sp2, selective),
        "tp2 sp mask-noise": Layout(2, "mask-noise", sp2, core=True),
        "tp2 sp next-token": Layout(2, "next-token", sp2),
        "tp2 sp score-entropy": Layout(2, "score-entropy", sp2, core=True),
        "pp2": Layout(2, "ragged", pp2),
        "pp2 vpp2 next-token": Layout(2, "next-token", vp2),
        "pp2 uneven": Layout(2, parallel={**pp2, "layers_per_chunk": [1, 3]}),
        "pp2 tied": Layout(2, "tied", pp2, core=True),
        "pp2 vpp2": Layout(2, "ragged", vp2, core=True),
        "pp2 vpp2 tied": Layout(2, "tied", vp2),
        "cp2": Layout(2, parallel=cp2, core=True),
        "cp2 autoregressive": Layout(2, "autoregressive", cp2),
        "cp2 next-token": Layout(2, "next-token", cp2, core=True),
        "cp2 mask-noise": Layout(2, "mask-noise", cp2),
        "cp2 mdlm": Layout(2, "mdlm", cp2, core=True),
        "cp2 two-copies": Layout(2, "two-copies", cp2),
        "dp2 zero0": Layout(2, "ragged", {"zero_stage": 0}, core=True),
        "dp2 zero1": Layout(2, "ragged", {"zero_stage": 1}),
        "dp2 zero2": Layout(2, "ragged", {"zero_stage": 2}),
        "dp2 zero3": Layout(2, "ragged", {"zero_stage": 3}),
        "dp2 zero3 tied": Layout(2, "tied", {"zero_stage": 3}, full),
        "dp2 zero2 offload": Layout(2, parallel={"zero_stage": 2, "offload_optimizer": True}),
        "dp2 zero3 offload": Layout(2, parallel={"zero_stage": 3, "offload_optimizer": True}),
        "pp3 uneven": Layout(3, parallel={"pipeline": 3}),
        "tp4": Layout(4, "wide", {"tensor": 4}),
        "tp4 sp": Layout(4, "wide", {"tensor": 4, "sequence": True}),
        "pp4": Layout(4, parallel={"pipeline": 4}),
        "cp4": Layout(4, parallel={"context": 4}),
        "dp4 zero0": Layout(4, "ragged", {"zero_stage": 0}),
        "dp4 zero1": Layout(4, "ragged", {"zero_stage": 1}),
        "dp4 zero2": Layout(4, "ragged", {"zero_stage": 2}),
        "dp4 zero3": Layout(4, "ragged", {"zero_stage": 3}, core=True),
        "tp2 pp2": Layout(4, "official", {**tp2, **pp2}),
        "tp2 sp pp2 tied": Layout(4, "tied", {**sp2, **pp2}, full),
        "tp2 sp pp2 vpp2": Layout(4, "official", {**sp2, **vp2}, {"micro_batch_size": 2}, core=True),
        "tp2 sp cp2": Layout(4, "two-copies", {**sp2, **cp2}, {"micro_batch_size": 2}, core=True),
        "tp2 zero3": Layout(4, parallel={**tp2, "zero_stage": 3}),
        "pp2 cp2": Layout(4, parallel={**pp2, **cp2}),
        "pp2 dp2 zero2": Layout(4, "ragged", {**pp2, "zero_stage": 2}),
        "cp2 dp2 zero3": Layout(4, parallel={**cp2, "zero_stage": 3}),
        "pp2 vpp2 dp2 zero0": Layout(4, "tied", {**vp2, "zero_stage": 0}),
        "tp2 sp pp2 dp2": Layout(8, "tied", {**sp2, **pp2}, core=True),
        "tp2 sp pp2 cp2": Layout(8, parallel={**sp2, **pp2, **cp2}),
        "tp2 pp2 vpp2 dp2 zero2": Layout(8, parallel={**tp2, **vp2, "zero_stage": 2}),
        "tp2 sp cp2 dp2 zero3": Layout(8, "wide", {**sp2, **cp2, "zero_stage": 3}),
    }


def _of_mixtures() -> dict[str, Layout]:
    tp2, pp2, cp2, ep2 = {"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"expert": 2}
    sp2, vp2 = {**tp2, "sequence": True}, {**pp2, "virtual_pipeline": 2}
    return {
        "one moe": Layout(1, "moe"),
        "one moe-sigmoid": Layout(1, "moe-sigmoid"),
        "one moe-two-copies": Layout(1, "moe-two-copies"),
        "one moe-mdlm": Layout(1, "moe-mdlm"),
        "one moe-next-token": Layout(1, "moe-next-token"),
        "one moe recompute-full": Layout(1, "moe", train={"recompute": "full"}),
        "one moe recompute-selective": Layout(1, "moe", train={"recompute": "selective"}),
        "one moe offload": Layout(1, "moe", {"offload_optimizer": True}),
        "tp2 moe": Layout(2, "moe", tp2),
        "tp2 sp moe": Layout(2, "moe", sp2),
        "pp2 vpp2 moe": Layout(2, "moe", vp2),
        "dp2 zero3 moe": Layout(2, "moe", {"zero_stage": 3}),
        "ep2 moe": Layout(2, "moe", ep2),
        "ep2 moe-sigmoid": Layout(2, "moe-sigmoid", ep2, core=True),
        "ep2 moe-two-copies": Layout(2, "moe-two-copies", ep2, core=True),
        "ep2 moe-mdlm": Layout(2, "moe-mdlm", ep2),
        "ep2 moe-next-token": Layout(2, "moe-next-token", ep2),
        "ep2 zero0 moe": Layout(2, "moe", {**ep2, "zero_stage": 0}),
        "ep2 zero2 moe": Layout(2, "moe", {**ep2, "zero_stage": 2}),
        "ep2 moe recompute-full": Layout(2, "moe", ep2, {"recompute": "full"}),
        "ep2 moe recompute-selective": Layout(2, "moe", ep2, {"recompute": "selective"}),
        "ep2 moe-sigmoid groups": Layout(2, "moe-sigmoid", ep2, optimizer="groups"),
        "ep2 cp2 moe": Layout(2, "moe", {**ep2, **cp2}),
        "ep2 cp2 moe-mdlm": Layout(2, "moe-mdlm", {**ep2, **cp2}),
        "ep2 micro-batches of 2 moe": Layout(2, "moe", ep2, {"micro_batch_size": 2}),
        "ep4 moe": Layout(4, "moe", {"expert": 4}),
        "ep4 moe-sigmoid": Layout(4, "moe-sigmoid", {"expert": 4}),
        "ep4 cp2 moe": Layout(4, "moe", {"expert": 4, **cp2}),
        "ep2 cp2 dp2 moe": Layout(4, "moe-two-copies", {**ep2, **cp2}),
        "ep2 dp2 zero0 moe": Layout(4, "moe", {**ep2, "zero_stage": 0}),
        "ep2 dp2 zero1 moe": Layout(4, "moe", {**ep2, "zero_stage": 1}),
        "ep2 dp2 zero2 moe": Layout(4, "moe", {**ep2, "zero_stage": 2}, core=True),
        "ep2 tp2 moe": Layout(4, "moe", {**ep2, **tp2}),
        "ep2 tp2 sp moe": Layout(4, "moe", {**ep2, **sp2}),
        "ep2 tp2 sp moe-sigmoid": Layout(4, "moe-sigmoid", {**ep2, **sp2}),
        "ep2 pp2 moe": Layout(4, "moe", {**ep2, **pp2}),
        "ep2 pp2 vpp2 moe": Layout(4, "moe", {**ep2, **vp2}, core=True),
        "ep2 pp2 vpp2 recompute-full moe-sigmoid": Layout(4, "moe-sigmoid", {**ep2, **vp2}, {"recompute": "full"}),
        # One rank has only the expert that nobody chooses.
        "ep8 moe-two-copies": Layout(8, "moe-two-copies", {"expert": 8}),
        "ep2 tp2 sp cp2 moe": Layout(8, "moe", {**ep2, **sp2, **cp2}),
        "ep2 tp2 sp pp2 vpp2 moe": Layout(8, "moe", {**ep2, **sp2, **vp2}),
        "ep2 pp2 dp2 zero2 moe-two-copies": Layout(8, "moe-two-copies", {**ep2, **pp2, "zero_stage": 2}),
    }


def _of_optimizers() -> dict[str, Layout]:
    tp2, pp2 = {"tensor": 2, "sequence": True}, {"pipeline": 2}
    groups, lion = {"optimizer": "groups"}, {"optimizer": "lion"}
    return {
        "dp2 zero1 groups": Layout(2, "ragged", {"zero_stage": 1}, **groups),
        "dp2 zero2 groups offload": Layout(2, "ragged", {"zero_stage": 2, "offload_optimizer": True}, **groups),
        "dp2 zero3 groups": Layout(2, "tied", {"zero_stage": 3}, **groups),
        "dp2 zero3 groups offload": Layout(2, "ragged", {"zero_stage": 3, "offload_optimizer": True}, **groups),
        "tp2 sp groups": Layout(2, "official", tp2, **groups),
        "pp2 tied groups": Layout(2, "tied", pp2, **groups, core=True),
        "pp2 vpp2 dp2 zero2 groups": Layout(4, "ragged", {**pp2, "virtual_pipeline": 2, "zero_stage": 2}, **groups),
        "pp2 groups offload": Layout(2, "tied", {**pp2, "offload_optimizer": True}, **groups),
        "pp2 dp4 groups": Layout(8, "tied", pp2, **groups),
        "dp2 zero0 lion": Layout(2, "small", {"zero_stage": 0}, **lion),
        "dp2 zero1 lion": Layout(2, "small", {"zero_stage": 1}, **lion),
        "dp2 zero3 lion": Layout(2, "small", {"zero_stage": 3}, **lion, core=True),
        "dp2 zero3 lion offload": Layout(2, "small", {"zero_stage": 3, "offload_optimizer": True}, **lion),
        "tp2 sp lion": Layout(2, "small", tp2, **lion),
        "pp2 lion": Layout(2, "small", pp2, **lion),
        "pp2 dp2 zero2 lion": Layout(4, "small", {**pp2, "zero_stage": 2}, **lion),
    }


LAYOUTS = _layouts() | _of_mixtures() | _of_optimizers()


def recipe(layout: Layout) -> Recipe:
    case = CASES[layout.case]
    return Recipe(
        name="parity",
        model=case.model,
        diffusion=DiffusionRecipe(block_size=case.block_size, noisy_copies=case.copies, objective=case.objective),
        data=DataRecipe(path="unused", seq_len=LENGTH),
        train=TrainRecipe(
            steps=case.steps, global_batch_size=BATCH, precision="fp32", **{"micro_batch_size": 1, **layout.train}
        ),
        parallel=ParallelRecipe(**layout.parallel),
        optimizer=OptimizerRecipe(lr=0.01, clip_grad_norm=0.5, ema_decay=0.5, **OPTIMIZERS[layout.optimizer]),
    )


def build(recipe: Recipe, groups: ProcessGroups, dtype: torch.dtype = torch.float32) -> Chunks:
    """Build this rank's part of the model."""
    return build_model(
        recipe.model,
        VOCABULARY,
        groups,
        parallel=recipe.parallel,
        dtype=dtype,
        device=torch.device("cpu"),
        seed=3,
        recompute=recipe.recomputation,
    )


def batch(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Draw random tokens and masks of whole sequences; the last two sequences have no masked token.

    masked: [copies, B, L]; mask_rate: [copies, B, L].
    """
    generator = torch.Generator().manual_seed(1000 * case.seed + seed)
    doc_ids = torch.repeat_interleave(torch.arange(len(case.documents)), torch.tensor(case.documents))
    starts = torch.tensor([0, *case.documents[:-1]]).cumsum(0)[doc_ids]
    clean = torch.randint(0, 57, (BATCH, LENGTH), generator=generator)
    rate = torch.rand(case.copies, BATCH, 1, generator=generator).expand(-1, -1, LENGTH) * 0.8 + 0.1
    masked = torch.rand(case.copies, BATCH, LENGTH, generator=generator) < rate
    masked[:, -2:] = False
    if case.complementary:
        masked, rate = torch.stack([masked[0], ~masked[0]]), torch.stack([rate[0], 1 - rate[0]])
    noise = {}
    if case.mask_noise_std:
        # As in training, the noise is drawn as rows of a table.
        ids = torch.arange(BATCH)
        rows = draw_embedding_noise(ids, LENGTH, seed=seed, epoch=0, copies=case.copies, rows=NOISE_ROWS)
        table = noise_table(case.model.hidden_size, torch.device("cpu"), torch.float32)
        noise = {"mask_noise": case.mask_noise_std * table[rows]}
    return noise | {
        "clean": clean,
        "masked": masked,
        "mask_rate": rate,
        "doc_ids": doc_ids.expand(BATCH, -1),
        "document_start": starts.expand(BATCH, -1),
        "positions": (torch.arange(LENGTH) - starts).expand(BATCH, -1),
    }
