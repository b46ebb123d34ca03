"""Check what a recipe needs of this machine, for `bd3-scale doctor --recipe`: the checks of a run, before it starts.

Ranks run the same checks when they start. Here they run at once and together, without the ranks.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence

from bd3_scale.data.manifest import Manifest, check_seq_len, combine, load_parts
from bd3_scale.launch.findings import Finding, checked
from bd3_scale.observe.environment import Environment, has_fast_bf16
from bd3_scale.recipe.checks import check_against_data, check_recipe, data_parallel_size, world_size_for_launch
from bd3_scale.recipe.load import with_plugins
from bd3_scale.recipe.schema import DataRecipe, Recipe, RecipeError

TOPIC = "recipe"
_CHANGE = "change it as it says; `bd3-scale recipe explain KEY` shows the rules of a key"


def needs(recipe: Recipe, environment: Environment, plugins: Sequence[str] = ()) -> list[Finding]:
    """Return the findings about a recipe on this machine. plugins: modules of the command line, beside the recipe's."""
    try:
        recipe = with_plugins(recipe, plugins)
    except ValueError as error:
        fix = "install the plug-in, or put its folder on PYTHONPATH"
        return [Finding(TOPIC, "plug-ins", str(error), "problem", "every plug-in can be imported", fix)]
    world_size = world_size_for_launch(recipe)
    try:
        check_recipe(recipe, world_size)
    except RecipeError as error:
        # Without a sound recipe the other checks would say what follows from this.
        return [Finding(TOPIC, "rules", problem, "problem", "every rule holds", _CHANGE) for problem in error.problems]
    found = [_layout(recipe, world_size), _processes(world_size, environment), _precision(recipe), _attention(recipe)]
    found += packages(recipe)
    manifest, of_data = _data(recipe, world_size)
    found += of_data
    if manifest is not None:
        found += _sizes(recipe, manifest, world_size, environment)
    return found


def _layout(recipe: Recipe, world_size: int) -> Finding:
    parallel = recipe.parallel
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    sizes |= {"expert": parallel.expert, "data": data_parallel_size(recipe, world_size)}
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    return Finding(TOPIC, "layout", f"{world_size} processes: {shown}", rule="every rule of the recipe holds")


def _processes(world_size: int, environment: Environment) -> Finding:
    gpus, cores = len(environment.gpus), environment.cpu_cores
    return checked(
        TOPIC,
        "processes",
        f"{world_size} on {gpus} GPUs" if gpus else f"{world_size} on {cores} CPU cores",
        rule="one process for each GPU, or at most one for each core without GPUs",
        fix=f"start {gpus or cores} or fewer (launch.processes, or a layout of fewer ranks), or use more machines "
        "(`bd3-scale submit`)",
        broken=world_size > (gpus or cores),
        verdict="problem" if gpus else "warning",
    )


def _precision(recipe: Recipe) -> Finding:
    return checked(
        TOPIC,
        "precision",
        f"{'bf16' if _takes_bf16(recipe) else 'fp32'}, by train.precision={recipe.train.precision}",
        rule="bf16 where the hardware multiplies it, else fp32",
        fix="set train.precision=auto: torch emulates bf16 here, which is slower than fp32",
        broken=_takes_bf16(recipe) and not has_fast_bf16(),
        verdict="warning",
    )


def _takes_bf16(recipe: Recipe) -> bool:
    return has_fast_bf16() if recipe.train.precision == "auto" else recipe.train.precision == "bf16"


def _attention(recipe: Recipe) -> Finding:
    import torch

    from bd3_scale.attention.backends import choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if _takes_bf16(recipe) else torch.float32
    rule = "the attention backend runs on this device with this precision and head size"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            name = choose_backend(recipe.attention_backend, device, dtype, recipe.model.head_size)
    except ValueError as error:
        return Finding(TOPIC, "attention", str(error), "problem", rule, "set attention_backend=auto")
    if caught:
        fix = "take a head size of the kernels, or install what the message names"
        return Finding(TOPIC, "attention", str(caught[0].message), "warning", rule, fix)
    return Finding(TOPIC, "attention", f"{name} on {device.type}", rule=rule)


def packages(recipe: Recipe) -> Iterator[Finding]:
    """Check the optional packages that the recipe uses: file systems of remotes, and TensorBoard."""
    import fsspec

    for protocol in sorted({remote.partition("://")[0] for remote in recipe.data.remotes if "://" in remote}):
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            fix = "install the package that the message names, such as `pip install 'bd3_scale[s3]'`"
            yield Finding(TOPIC, f"{protocol}://", str(error), "problem", "its file system can be imported", fix)
    if recipe.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fix = "`pip install 'bd3_scale[tensorboard]'`, or set logging.tensorboard=false"
        yield Finding(TOPIC, "TensorBoard", "not installed", "problem", "logging.tensorboard has its package", fix)


def _data(recipe: Recipe, world_size: int) -> tuple[Manifest | None, list[Finding]]:
    """Check that the data can be read and suit the recipe; return what they say together, where they do."""
    # A remote that is away is reported at once: nobody waits for a run here.
    data = recipe.data.model_copy(update={"retry_minutes": 0.0})
    rule = "prepared data with the recipe's sequence length, tokeniser and block sizes"
    where = ", ".join(recipe.data.remotes + recipe.data.folders)
    try:
        manifest = _checked_manifest(recipe, data, world_size)
    except (ValueError, OSError) as error:
        fix = "prepare the data (`bd3-scale data prepare … --recipe RECIPE`), or correct the recipe as the message says"
        return None, [Finding(TOPIC, "data", str(error), "problem", rule, fix)]
    sequences = manifest.train.sequences if manifest.train is not None else 0
    epochs = recipe.train.steps * recipe.train.global_batch_size / max(1, sequences)
    value = f"{where}: {sequences:,} sequences of {manifest.seq_len} tokens, {epochs:.2g} epochs"
    return manifest, [Finding(TOPIC, "data", value, rule=rule)]


def _checked_manifest(recipe: Recipe, data: DataRecipe, world_size: int) -> Manifest:
    from bd3_scale.train.setup import check_held_out

    parts = load_parts(data)
    for name, source in data.by_source.items():
        check_seq_len(source, parts[name])
    manifest = combine(parts)
    check_against_data(recipe, world_size, manifest.document_multiple)
    check_held_out(recipe, manifest)
    return manifest


def _sizes(recipe: Recipe, manifest: Manifest, world_size: int, environment: Environment) -> Iterator[Finding]:
    """Check memory and disk by closed forms, lower bounds: `bd3-scale plan` predicts all of a rank's memory."""
    # Where it must guess, DeepSpeed logs what it found to stdout, between the lines of `--json`.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if environment.gpus else "cpu")
    from bd3_scale.plan.forecast import checkpoint_bytes
    from bd3_scale.plan.rank import num_parameters

    parameters = num_parameters(recipe.model, manifest.vocabulary)
    a_checkpoint = checkpoint_bytes(recipe, parameters)
    yield _memory(recipe, parameters, a_checkpoint, world_size, environment)
    kept = recipe.checkpoint.keep_last + recipe.checkpoint.keep_best
    yield _disk(recipe, a_checkpoint, kept)


def _memory(recipe: Recipe, parameters: int, states_bytes: int, world_size: int, environment: Environment) -> Finding:
    parallel = recipe.parallel
    parts = parallel.tensor * parallel.pipeline * parallel.expert
    weight_bytes = 2 if _takes_bf16(recipe) else 4
    # A lower bound: as if everything divided evenly, and without activations and buffers of messages.
    states = states_bytes / (world_size if parallel.zero_stage else parts)
    a_rank = parameters * (weight_bytes + 4) / parts + states
    gpus = environment.gpus
    have = min(gpu.memory_gib for gpu in gpus) * 2**30 if gpus else _host_memory() / world_size
    return checked(
        TOPIC,
        "memory of a rank",
        f"{a_rank / 1e9:.3g} GB and activations, of {have / 1e9:.3g} GB ({parameters / 1e6:,.4g} M parameters)",
        rule="weights, gradients and optimiser states of a rank fit; `bd3-scale plan` predicts the activations",
        fix="raise parallel.tensor, pipeline or zero_stage, or use more machines (`bd3-scale plan --search`)",
        broken=a_rank > have,
    )


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disk(recipe: Recipe, a_checkpoint: int, kept: int) -> Finding:
    folder = recipe.run_path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    # A new checkpoint is complete before an older one is removed.
    needed, free = a_checkpoint * (kept + 1), shutil.disk_usage(folder).free
    return checked(
        TOPIC,
        "disk for checkpoints",
        f"{needed / 1e9:.3g} GB of {free / 1e9:,.3g} GB free in {folder}",
        rule=f"{kept} checkpoints and the one being written, of {a_checkpoint / 1e9:.3g} GB each",
        fix="free space, set run_dir to another disk, or lower checkpoint.keep_last and keep_best",
        broken=needed > free,
    )
