"""Run `bd3-scale plan`: predict what a recipe needs and takes on GPUs, before anybody pays for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bd3_scale.observe.console import put
from bd3_scale.observe.progress import Bar
from bd3_scale.resilience.terminal import tell

if TYPE_CHECKING:
    from bd3_scale.plan.hardware import Hardware
    from bd3_scale.recipe.schema import Recipe
    from bd3_scale.recipe.vocabulary import Vocabulary

app = typer.Typer()


@app.command(epilog="Example: bd3-scale plan recipes/8b.yaml --gpus 64 --vocabulary 151936 train.micro_batch_size=2")
def plan(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file, or a name of `bd3-scale recipe list`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace recipe values.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Of the whole run.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, b200, or a YAML file that describes one.")] = "h100",
    vocabulary: Annotated[
        int | None, typer.Option(min=2, help="Token ids with the mask.", show_default="the data's")
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Say how many days so many tokens take.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the layouts that fit, the quickest first.")] = False,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Results of tools/bench_step.py or bench_attention.py --json; may be given twice."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the calibrated GPU here, for --gpu.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predict memory, time and cost of a recipe on GPUs: its real code runs on fake devices, here, on a CPU.

    Nothing of it is measured; the assumptions are printed.
    """
    from bd3_scale.plan.forecast import forecast
    from bd3_scale.plan.hardware import load_hardware
    from bd3_scale.plan.show import show
    from bd3_scale.recipe.load import load_recipe, with_plugins

    loaded = with_plugins(load_recipe(recipe, overrides or ()), context.obj)
    if out is not None and not calibrate:
        raise typer.BadParameter("--out FILE keeps what --calibrate has found: give that, too")
    hardware = calibrated(load_hardware(gpu), calibrate, out) if calibrate else load_hardware(gpu)
    ids = vocabulary_of(loaded, vocabulary)
    if search:
        search_layouts(loaded, ids, gpus, hardware, as_json=as_json)
        return
    with Bar("ranks traced") as bar:
        result = forecast(loaded, ids, gpus, hardware, device=fake_device(), progress=bar.show)
    if as_json:
        put(json.dumps(result.as_json(), indent=1))
    else:
        show(result, tokens)
    if not result.fits:
        raise typer.Exit(1)


def calibrated(hardware: Hardware, files: list[Path], out: Path | None) -> Hardware:
    """Return the hardware with measured values; print them with the assumed ones, and write them to `out` if given."""
    from bd3_scale.plan.calibrate import calibrate
    from bd3_scale.recipe.plain_yaml import dump_yaml
    from bd3_scale.resilience.files import write_atomically

    result, compared = calibrate(hardware, files, device=fake_device())
    for name in dict.fromkeys(result.measured):
        tell(f"{hardware.device}: {name} {getattr(result, name)} as measured, {getattr(hardware, name)} as assumed")
    if compared is not None:
        for phase, seconds in compared.measured.items():
            tell(
                f"{phase}: measured {seconds:.4f} s, predicted {compared.assumed[phase]:.4f} s as assumed and "
                f"{compared.calibrated[phase]:.4f} s as measured"
            )
    if out is not None:
        write_atomically(out, dump_yaml(result.model_dump(mode="json", exclude_defaults=True)))
        tell(f"wrote {out}: --gpu {out}")
    return result


def search_layouts(recipe: Recipe, vocabulary: Vocabulary, gpus: int, hardware: Hardware, *, as_json: bool) -> None:
    """Print the layouts of the GPUs that fit, the fastest first, and the recipe's values for the best one."""
    from bd3_scale.plan.search import search
    from bd3_scale.plan.show import show_layouts

    with Bar("steps traced") as bar:
        result = search(recipe, vocabulary, gpus, hardware, device=fake_device(), progress=bar.show)
    if as_json:
        put(json.dumps(result.as_json(), indent=1))
    else:
        show_layouts(result, hardware)
    if result.reason:
        tell(f"error: {result.reason}")
        raise typer.Exit(1)


def vocabulary_of(recipe: Recipe, size: int | None) -> Vocabulary:
    """Return a vocabulary of `size` ids, or that of the recipe's data if it is on this machine.

    ValueError: neither is known.
    """
    from bd3_scale.data.manifest import MANIFEST_FILE, load_manifest
    from bd3_scale.recipe.vocabulary import Vocabulary

    if size is not None:
        return Vocabulary(size=size, eos_id=0, mask_id=size - 1)
    path = recipe.data.first_source.path
    if not (Path(path) / MANIFEST_FILE).is_file():
        raise ValueError(f"{path} holds no prepared data to read the vocabulary from: give --vocabulary")
    return load_manifest(path).vocabulary


def fake_device() -> str:
    """Return the type of the fake devices; print what differs if they cannot be GPUs."""
    from bd3_scale.plan.fake_gpu import obstacle

    why = obstacle()
    if why is None:
        return "cuda"
    tell(f"note: fake devices are CPUs here ({why}): norms and activations count as several kernels each")
    return "cpu"
