"""Run one rank of a run on a fake device: its real code, from the model to the save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bd3_scale.checkpoint.saver import HostCopies
from bd3_scale.checkpoint.store import boxes_to_save
from bd3_scale.data.batch import Batch
from bd3_scale.model.build import layer_shapes, layers_with
from bd3_scale.model.rows import ModelInputs
from bd3_scale.objective import StepKeys, objective_of
from bd3_scale.parallel.engine import TrainingEngine, open_engine
from bd3_scale.parallel.groups import ProcessGroups
from bd3_scale.parallel.replicas import check_replicas
from bd3_scale.parallel.schedule import token_losses
from bd3_scale.parallel.simulated import simulated_groups, watch_messages
from bd3_scale.plan import fake_gpu
from bd3_scale.plan.job import Job
from bd3_scale.plan.recorder import Recorder
from bd3_scale.plan.trace import Trace
from bd3_scale.recipe.schema import ModelRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.train.inputs import step_inputs
from bd3_scale.train.step import train_on


def trace_rank(job: Job, device: torch.device) -> Trace:
    """Return the trace of the last step of a rank on a fake `device`.

    Memory and the order of messages also cover what happens between steps, if the job asks for it.
    """
    recipe = job.recipe
    groups = simulated_groups(recipe.parallel, rank=job.rank, world_size=job.world_size)
    inputs = example_inputs(job, groups)
    recorder = Recorder(device.type, _names(groups), _pairs(inputs))
    if device.type == "cuda":
        fake_gpu.watch(recorder.waited)
    watch_messages(recorder.waited_for_message)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, torch.autograd.set_multithreading_enabled(False):
        with recorder.phase("engine"):
            engine = open_engine(recipe, job.vocabulary, groups, device=device, seed=None)
        _label(recorder, engine)
        micro_batches = [inputs.to(device)] * job.micro_batches
        with recorder.following(engine.chunks):
            for number in range(1, job.steps + 1):
                recorder.begin()
                _step(recorder, engine, micro_batches, recipe, number)
        model = job.whole or recipe.model
        trace = recorder.trace(job.micro_batches, engine.flops(micro_batches, model))
        if job.beyond:
            _between_steps(recorder, engine, micro_batches, groups)
            trace = replace(trace, segments=recorder.segments())
    return replace(trace, parameters=num_parameters(model, job.vocabulary))


def _step(
    recorder: Recorder, engine: TrainingEngine, micro_batches: Sequence[ModelInputs], recipe: Recipe, step: int
) -> None:
    tokens = recipe.train.global_batch_size * recipe.data.seq_len
    # `meanwhile` is called after the backward pass, when the update begins.
    with recorder.phase("gradients"):
        train_on(
            engine, recipe, micro_batches, step=step, tokens=tokens, meanwhile=lambda: recorder.enter_phase("update")
        )


def _label(recorder: Recorder, engine: TrainingEngine) -> None:
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            recorder.label(getattr(parameter, "ds_tensor", parameter), "weights")
    for sums in engine.gradient_sums:
        recorder.label(sums, "gradients")
    for fragment in engine.zero.fragments():
        for state in fragment.states.values():
            recorder.label(state, "optimizer")


def _between_steps(
    recorder: Recorder,
    engine: TrainingEngine,
    micro_batches: Sequence[ModelInputs],
    groups: ProcessGroups,
) -> None:
    with recorder.phase("replicas"):
        check_replicas(engine.chunks, engine.layouts, groups, 1)
    with recorder.phase("evaluation"), engine.zero.evaluation_weights():
        token_losses(engine.chunks, micro_batches, groups)
    with recorder.phase("save"):
        HostCopies().of([box.data.detach() for box in boxes_to_save(engine.zero, engine.layouts)])


def num_parameters(model: ModelRecipe, vocabulary: Vocabulary) -> int:
    """Return the number of weights of the whole model, each counted once."""
    embedding = vocabulary.padded_size * model.hidden_size
    norm = model.hidden_size * (1 + model.norm_bias)
    head = embedding * (not model.tie_embeddings) + vocabulary.padded_size * model.head_bias
    of_layers = sum(
        len(layers_with(model, name)) * math.prod(shape)
        for name, shape in layer_shapes(model).items()
        # It is a buffer and no weight.
        if not name.endswith(".expert_bias")
    )
    return embedding + of_layers + norm + head


def example_inputs(job: Job, groups: ProcessGroups) -> ModelInputs:
    """Return a micro-batch of whole documents of random tokens, on the host, with real masks and counts."""
    recipe = job.recipe
    size, length = recipe.train.micro_batch_size, recipe.data.seq_len
    first = groups.dp.rank() * size
    ids = torch.arange(first, first + size)
    batch = Batch(
        ids=ids,
        slots=ids % recipe.train.global_batch_size,
        epochs=torch.zeros_like(ids),
        source_keys=torch.zeros_like(ids),
        tokens=torch.zeros(size, length, dtype=torch.int64),
        document_start=torch.zeros(size, length, dtype=torch.int32),
        positions=torch.arange(length).expand(size, -1).contiguous(),
        counted=torch.ones(size, length, dtype=torch.bool),
        shown=torch.zeros(size, length, dtype=torch.bool),
    )
    keys = StepKeys(0, recipe.seed, recipe.train.global_batch_size, {})
    (inputs,) = step_inputs(objective_of(recipe.diffusion, job.vocabulary), recipe, batch, groups, keys=keys)
    return inputs


def _pairs(inputs: ModelInputs) -> dict[int, int]:
    """Return the query-key pairs of a micro-batch, by the number of query rows of a sequence."""
    noisy_rows = inputs.num_noisy * inputs.positions.shape[1]
    all_pairs = inputs.noisy_pairs + inputs.clean_pairs
    return {noisy_rows: inputs.noisy_pairs, inputs.tokens.shape[1]: all_pairs}


def _names(groups: ProcessGroups) -> dict[str, str]:
    """Return what each group is for, by its name in torch.distributed."""
    purposes = {
        "tp": "tensor",
        "cp": "context",
        "pp": "pipeline",
        "dp_cp": "data",
        "dp": "data",
        "embd": "tied",
        "mp": "model",
        "ep": "expert",
        "expt_dp": "expert-data",
    }
    names: dict[str, str] = {}
    for attribute, purpose in purposes.items():
        group = getattr(groups, attribute, None)
        if group is not None:
            names.setdefault(group.group_name, purpose)
    return names
