"""The recipe: everything a person decides about a run, typed, frozen and validated.

What follows from the data (vocabulary, sequence count) is read from the data manifest, and what follows from the
machine (world size, data-parallel degree) from the launcher: neither is stored here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bd3_scale.recipe.data import DATA_RETRY_MINUTES as DATA_RETRY_MINUTES
from bd3_scale.recipe.data import DataRecipe as DataRecipe
from bd3_scale.recipe.data import DataSource as DataSource
from bd3_scale.recipe.data import MixtureStage as MixtureStage
from bd3_scale.recipe.section import NAME as NAME
from bd3_scale.recipe.section import NonNegativeFloat as NonNegativeFloat
from bd3_scale.recipe.section import NonNegativeInt as NonNegativeInt
from bd3_scale.recipe.section import PositiveFloat as PositiveFloat
from bd3_scale.recipe.section import PositiveInt as PositiveInt
from bd3_scale.recipe.section import RecipeError as RecipeError
from bd3_scale.recipe.section import Section as Section
from bd3_scale.recipe.section import Share as Share
from bd3_scale.recipe.section import without_controls as without_controls
from bd3_scale.registry import MODULE_NAME

Recompute = Literal["none", "selective", "full"]
AdamBeta = Annotated[float, Field(ge=0, lt=1)]


class RopeScaling(Section):
    """Llama 3's stretch of the slow rotary frequencies (Grattafiori et al., 2024; `rope_type: llama3`)."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


# What of `model.moe` matters in training alone: models with other values of these have the same tensors.
MOE_TRAINING = frozenset({"bias_update_rate", "aux_loss", "z_loss"})


class MoeRecipe(Section):
    """Mixture of experts in place of the MLP: of each row, `top_k` of `num_experts` SwiGLU experts compute."""

    num_experts: PositiveInt
    top_k: PositiveInt = Field(description="experts that a row is sent to")
    ffn_hidden_size: PositiveInt = Field(description="of one expert")
    shared_ffn_hidden_size: NonNegativeInt = Field(0, description="of the expert that takes every row; 0: none")
    first_dense_layers: NonNegativeInt = Field(
        0, description="so many first layers have an MLP of model.ffn_hidden_size instead"
    )
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="of a row for each expert: softmax over all (Qwen3-MoE, SDAR-MoE), sigmoid (LLaDA2)"
    )
    normalize_top_k: bool = Field(True, description="the scores of a row's experts are divided by their sum")
    scale: PositiveFloat = Field(1.0, description="factor of what the experts, but the shared one, add")
    groups: PositiveInt = Field(1, description="experts are divided into so many groups, and of each row ...")
    top_groups: PositiveInt | None = Field(None, description="... so many take part; default: all")
    bias: bool = Field(
        False, description="experts that are chosen less than others get a bias for the choice (DeepSeek-V3)"
    )
    bias_update_rate: NonNegativeFloat = Field(0.001, description="by which a step moves each bias")
    aux_loss: NonNegativeFloat = Field(
        0.0, description="factor of a loss that is 1 for a sequence whose rows spread evenly over the experts"
    )
    z_loss: NonNegativeFloat = Field(
        0.0, description="factor of the mean square of the router's log-sum-exp (ST-MoE), which keeps logits small"
    )


class ModelRecipe(Section):
    """The transformer. Defaults give the Qwen3 shape, which the serving format needs; see DESIGN on SDAR."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = Field(None, description="key/value heads; default: num_attention_heads")
    head_dim: PositiveInt | None = Field(None, description="default: hidden_size / num_attention_heads")
    ffn_hidden_size: PositiveInt
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = Field(False, description="bias of layernorm; rmsnorm has none")
    norm_eps: PositiveFloat = 1e-6
    qk_norm: bool = Field(True, description="RMSNorm on each head's query and key before RoPE")
    mlp_bias: bool = False
    attention_bias: bool = Field(False, description="bias of the query/key/value projection")
    head_bias: bool = False
    tie_embeddings: bool = False
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of a head's channels that rotary embeddings turn"
    )
    moe: MoeRecipe | None = Field(None, description="mixture of experts; default: every layer has one MLP")
    init_std: PositiveFloat = 0.02

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Return how many channels of a head rotary embeddings turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def dense_layers(self) -> int:
        """Layers with an MLP; those behind them, if any, have a mixture of experts."""
        return self.num_layers if self.moe is None else self.moe.first_dense_layers


class BlockSizePhase(Section):
    block_size: PositiveInt
    steps: PositiveInt


class DiffusionRecipe(Section):
    """Block diffusion objective (Arriola et al., ICLR 2025)."""

    block_size: PositiveInt = Field(description="L', tokens a block; 1 is autoregressive, seq_len is MDLM")
    block_size_schedule: Annotated[tuple[BlockSizePhase, ...], Field(strict=False)] = Field(
        (), description="block sizes of the steps before `block_size`, one after the other"
    )
    block_size_choices: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = Field(
        (), description="each sequence draws its block size among these, in the steps of `block_size`, which evaluates"
    )
    objective: str = Field(
        "block_diffusion",
        description="what the model is trained for, a name in `registry.objectives`; `bd3_scale/objective/` has a file "
        "for each of the package's",
    )
    objective_options: dict[str, bool | int | float | str] = Field(
        {}, description="what a plug-in's objective takes beside the options here, such as gamma: 2"
    )
    mask_rate_low: Share = Field(0.0, description="beta, the lower end of the clipped mask-rate interval in training")
    mask_rate_high: Share = Field(1.0, description="omega, its upper end")
    search_interval: bool = Field(
        False, description="every evaluation searches the interval of least variance, and training follows"
    )
    noise_schedule: str = Field(
        "linear", description="mask rate p(t) of the noise level, a name in `registry.schedules`; linear can be clipped"
    )
    noise_steps: PositiveInt | None = Field(
        None, description="T of finite-time diffusion (absorbing D3PM); default: continuous time"
    )
    loss_weights: Literal["nelbo", "unit_when_heavy"] = Field(
        "nelbo", description="nelbo: p'/p; unit_when_heavy: 1 where beta > 0.5, as the paper's code trains"
    )
    clip_masked_share: bool = Field(
        False, description="the masked share of each block, too, lies in [beta, omega] where its length allows"
    )
    noisy_copies: Literal[1, 2] = Field(
        1,
        description="noisy copies on one clean stream; two are complementary where beta + omega = 1, else independent",
    )
    mask_noise_std: NonNegativeFloat = Field(
        0.0, description="standard deviation of Gaussian noise on the embedding of masked tokens, falling to 0 ..."
    )
    mask_noise_steps: NonNegativeInt = Field(0, description="... over so many first steps")

    def block_sizes_at(self, step: int) -> tuple[int, ...]:
        """Block sizes of the optimiser step that follows `step` finished ones; each sequence takes one of them."""
        for phase in self.block_size_schedule:
            if step < phase.steps:
                return (phase.block_size,)
            step -= phase.steps
        return self.block_size_choices or (self.block_size,)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Return every block size of a training and its evaluations, once."""
        phases = (phase.block_size for phase in self.block_size_schedule)
        return tuple(dict.fromkeys((*phases, *self.block_size_choices, self.block_size)))

    def mask_noise_at(self, step: int) -> float:
        """Standard deviation of the noise on mask embeddings in the step that follows `step` finished ones."""
        return self.mask_noise_std * max(0.0, 1 - step / self.mask_noise_steps) if self.mask_noise_steps else 0.0


class ParameterGroup(Section):
    """What tensors have otherwise than the rest."""

    match: str = Field(description="pattern of names of tensors, as checkpoints have them, such as *layernorm*")
    lr_scale: NonNegativeFloat | None = Field(None, description="factor of the learning rate; default: 1")
    weight_decay: NonNegativeFloat | None = Field(
        None, description="default: the optimizer's, and 0 for tensors of one dimension, norms and biases"
    )

    @property
    def settings(self) -> dict[str, float]:
        """Return what is given."""
        return self.model_dump(include={"lr_scale", "weight_decay"}, exclude_none=True)


class OptimizerRecipe(Section):
    """The update of the weights, after a clip of the global gradient norm."""

    family: str = Field("adamw", description="a name in `registry.optimizers`")
    lr: PositiveFloat = 3e-4
    betas: Annotated[tuple[AdamBeta, AdamBeta], Field(strict=False)] = Field(
        (0.9, 0.95), description="decays of Adam's moments; of Lion's update and momentum, whose authors take 0.9, 0.99"
    )
    eps: PositiveFloat = 1e-8
    options: dict[str, bool | int | float | str] = Field({}, description="what a plug-in's family takes besides")
    weight_decay: NonNegativeFloat = 0.1
    groups: Annotated[tuple[ParameterGroup, ...], Field(strict=False)] = Field(
        (), description="of those that match a tensor, later ones go over earlier ones, key by key"
    )
    clip_grad_norm: NonNegativeFloat = Field(1.0, description="0: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt | None = Field(None, description="wsd only; default: a fifth of the steps")
    min_lr_ratio: Share = 0.1
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="0: no moving average is kept")


class TrainRecipe(Section):
    steps: PositiveInt
    global_batch_size: PositiveInt = Field(description="sequences an optimiser step, over all ranks")
    micro_batch_size: PositiveInt = Field(description="sequences a rank and forward")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the hardware is quick at it"
    )
    recompute: Recompute = Field(
        "none",
        description="activations computed again in backward: selective, of each attention without its projections; "
        "full, of whole layers",
    )
    recompute_layers: PositiveInt | None = Field(
        None, description="full only: the first so many layers of every pipeline chunk; default: all"
    )


class ParallelRecipe(Section):
    """How ranks split the model, the sequence and the optimiser; data parallelism is what remains."""

    tensor: PositiveInt = Field(1, description="ranks that split every layer's matrices")
    sequence: bool = Field(False, description="tensor-parallel ranks split the rows between those matrices, too")
    pipeline: PositiveInt = Field(1, description="stages that split the layers")
    virtual_pipeline: PositiveInt = Field(1, description="chunks of layers a stage; above 1: interleaved schedule")
    layers_per_chunk: Annotated[tuple[PositiveInt, ...], Field(strict=False)] | None = Field(
        None, description="layers of each chunk in the order of the layers; default: as even as they go"
    )
    context: PositiveInt = Field(1, description="ranks that split the positions of a sequence")
    expert: PositiveInt = Field(
        1, description="data- and context-parallel ranks that share out the experts; they add no ranks"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="data-parallel ranks divide 0: nothing, 1: optimiser states, 2: and reduced "
        "gradients, 3: and weights; the gradients of micro-batches add up whole on every rank",
    )
    offload_optimizer: bool = Field(False, description="optimiser states live in host memory")

    @property
    def model_size(self) -> int:
        """Ranks that together hold one replica of the model and one sequence."""
        return self.tensor * self.pipeline * self.context

    @property
    def fewest_ranks(self) -> int:
        """Ranks that the layout needs: those of as many replicas as share out the experts."""
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)

    def chunks(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline chunk in the order of the layers; chunk c is on stage c mod `pipeline`.

        Layers that do not divide evenly go to the middle: the first chunk has the embedding, the last one the head.
        """
        if self.layers_per_chunk is not None:
            return self.layers_per_chunk
        count = self.pipeline * self.virtual_pipeline
        few, more = divmod(num_layers, count)
        first = (count - more) // 2
        return tuple(few + (first <= chunk < first + more) for chunk in range(count))


class EvaluationRecipe(Section):
    every_steps: NonNegativeInt = Field(0, description="0: only at the end")
    sequences: PositiveInt = Field(64, description="held-out sequences used during training, at the most")
    draws: PositiveInt = Field(1, description="noise draws a sequence")


class CheckpointRecipe(Section):
    every_steps: NonNegativeInt = Field(0, description="0: only at the end and at SIGTERM or SIGUSR1")
    keep_last: PositiveInt = 2
    keep_every_steps: NonNegativeInt = Field(0, description="also those of multiples of so many steps; 0: none")
    keep_best: NonNegativeInt = Field(0, description="also so many of the lowest held-out NELBO")
    slow_seconds: PositiveFloat = Field(300.0, description="a save that takes longer is told while it lasts")
    verify: Literal["full", "fast"] = Field(
        "full",
        description="before a run goes on from one, and of a new one before older ones go: full compares every file's "
        "hash, fast its size",
    )


class GuardRecipe(Section):
    """What is done about steps that go wrong."""

    skip_steps: NonNegativeInt = Field(
        3,
        description="steps in a row with gradients that are not finite whose update is left out; one more ends the run",
    )
    spike_deviations: NonNegativeFloat = Field(
        10.0, description="a loss so many standard deviations above the last ones is recorded with its data; 0: none"
    )
    replicas_every_steps: NonNegativeInt = Field(100, description="ranks compare the weights that they share; 0: never")


class WandbRecipe(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, else offline"
    )
    project: str = "bd3_scale"
    entity: str | None = None


class LoggingRecipe(Section):
    every_steps: PositiveInt = 1
    wandb: WandbRecipe = WandbRecipe()


class Deadlines(Section):
    """Seconds without progress after which ranks are taken for hung."""

    start: PositiveFloat = Field(1800, description="until the first step is done: imports, loading, tuning, compiling")
    step: PositiveFloat = 600
    checkpoint: PositiveFloat = 1800
    evaluation: PositiveFloat = 3600
    data: PositiveFloat | None = Field(
        None, description="while a rank waits for its batch; default: 15 minutes more than data.retry_minutes"
    )

    def by_phase(self, data: DataRecipe) -> dict[str, float]:
        """Return the seconds of each phase of a run that reads `data`."""
        return self.model_dump() | {"data": self.data or 60 * (data.retry_minutes + 15)}


class LaunchRecipe(Section):
    """Used only where no launcher (torchrun, SLURM) has set RANK and WORLD_SIZE."""

    processes: PositiveInt | None = Field(
        None, description="default: the GPUs of this machine, or without one the fewest that the layout needs"
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads a process; default: $OMP_NUM_THREADS, or cores / processes"
    )
    deadlines: Deadlines = Deadlines()


class Recipe(Section):
    name: str = Field(pattern=NAME)
    deterministic: bool = True
    attention_backend: str = Field(
        "auto",
        description="a name in `registry.attention_backends`, or auto: the quickest that runs here; "
        "$BD3_SCALE_ATTENTION goes before it",
    )
    model: ModelRecipe
    diffusion: DiffusionRecipe
    parallel: ParallelRecipe = ParallelRecipe()
    plugins: Annotated[tuple[Annotated[str, Field(pattern=MODULE_NAME)], ...], Field(strict=False)] = Field(
        (), description="modules that register what the recipe names, imported first on every rank"
    )
    run_dir: str | None = Field(None, description="default: runs/<name>")
    init_from: str | None = Field(
        None, description="checkpoint or run directory whose weights training begins with; the optimiser begins anew"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    data: DataRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    train: TrainRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    guard: GuardRecipe = GuardRecipe()
    logging: LoggingRecipe = LoggingRecipe()
    launch: LaunchRecipe = LaunchRecipe()

    def evaluates_at(self, step: int) -> bool:
        """Return whether an evaluation is due between `step` finished steps and the next."""
        return bool(step and self.evaluation.every_steps) and step % self.evaluation.every_steps == 0

    @property
    def run_path(self) -> Path:
        """Folder of everything that the run writes."""
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def recomputation(self) -> tuple[Recompute, int | None]:
        """Return what is computed again in backward, and of how many layers of a chunk; see `TrainRecipe`."""
        return self.train.recompute, self.train.recompute_layers
