"""Print the results of `bd3-scale plan`, the most important first."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Column, Table

from bd3_scale.observe.console import Console, say
from bd3_scale.plan.forecast import Forecast, layout
from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.search import MEMORY_ERROR, TIME_ERROR, Layout, SearchResult
from bd3_scale.plan.timing import largest

# The most layouts that a search lists.
_LISTED = 10


def show(forecast: Forecast, tokens: float | None) -> None:
    """Print a forecast, the most important first."""
    hardware, time, run = forecast.hardware, forecast.time, forecast.run
    console = Console()
    say(f"{forecast.recipe.name}: {forecast.parameters / 1e9:.2f} B parameters on {forecast.gpus} {hardware.device}")
    say(f"{layout(forecast.recipe, forecast.gpus)}\n")
    _memory(forecast)
    say(
        f"\nstep {time.seconds:.2f} s, {forecast.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.0%}, all predicted\n"
        f"{run['steps']:,} steps: {_days(run['seconds'])}, {run['gpu_hours']:,.0f} GPU hours, "
        f"${run['cost']:,.0f} at ${hardware.price:g} a GPU hour"
    )
    if tokens is not None:
        say(f"{tokens:,.0f} tokens: {_days(tokens / forecast.tokens_per_second)}")
    checkpoint = forecast.checkpoint
    say(
        f"checkpoint {checkpoint['bytes'] / 1e9:,.1f} GB, {checkpoint['bytes_of_a_rank'] / 1e9:.2f} GB a rank: "
        f"{checkpoint['blocked_seconds']:.1f} s of training for the copy, {checkpoint['seconds']:,.0f} s to write"
    )
    if (cache := forecast.node_cache) is not None:
        say(f"data: {cache.describe(forecast.shuffle_window)} of {' and of '.join(forecast.recipe.data.remotes)}\n")
    _losses(forecast)
    console.print(_parts_table(forecast), _messages_table(forecast))
    waits = sum(forecast.waits.values())
    say(f"\nThe host waits for the GPU {waits:.0f} times a step, and launches for {time.host_seconds:.2f} s.")
    for note in forecast.notes:
        say(f"note: {note}")
    say(_assumptions(hardware))


def _memory(forecast: Forecast) -> None:
    """Print the memory on the card of a rank of each stage."""
    for rank in forecast.ranks:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in rank.memory.items() if size > 5e7)
        parts += f"; {rank.uneven_bytes / 1e9:.1f} for rows beyond the mean of experts" * bool(rank.uneven_bytes)
        left = f"{rank.margin_bytes / 1e9:.1f} left" if rank.margin_bytes >= 0 else "it does not fit"
        of_stage = f"stage {rank.stage}: " if forecast.recipe.parallel.pipeline > 1 else ""
        say(
            f"{of_stage}{rank.card_bytes / 1e9:.1f} GB on a card of {forecast.hardware.memory_gb:g}, {left}; tensors "
            f"{rank.peak_bytes / 1e9:.1f} at the peak ({rank.where})\n  {parts}"
        )


def _losses(forecast: Forecast) -> None:
    """Print what a step takes in addition to its FLOPs at the peak."""
    say(f"beyond {forecast.time.needed:.2f} s of FLOPs at the peak, a step takes")
    for name, seconds, remedy in largest(forecast.time.losses):
        say(f"  {seconds:6.2f} s  {seconds / forecast.time.seconds:5.1%}  {name}\n{' ' * 19}{remedy}")


def _parts_table(forecast: Forecast) -> Table:
    table = Table("part", "TFLOP", "GB moved", "launches", "s", title="A rank's step", box=box.SIMPLE_HEAD)
    for name, part in forecast.parts.items():
        launches = f"{part['launches']:,.0f}"
        table.add_row(
            name, f"{part['flops'] / 1e12:,.1f}", f"{part['bytes'] / 1e9:,.1f}", launches, f"{part['seconds']:.3f}"
        )
    return table


def _messages_table(forecast: Forecast) -> Table:
    table = Table("group", "messages", "GB", "s on the links", title="Messages of a rank's step", box=box.SIMPLE_HEAD)
    for name, group in forecast.messages.items():
        table.add_row(name, f"{group['calls']:,.0f}", f"{group['bytes'] / 1e9:,.2f}", f"{group['seconds']:.3f}")
    return table


def _days(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds > 172800 else f"{seconds / 3600:,.1f} hours"


def _assumptions(hardware: Hardware) -> str:
    measured = f"; measured: {', '.join(hardware.measured)}" if hardware.measured else "; none of it measured"
    return (
        f"assumed of {hardware.device}: {hardware.peak / 1e12:,.0f} TFLOP/s of which products reach "
        f"{hardware.matmul:.0%}, attention {hardware.attention[0] / 1e12:.0f} and {hardware.attention[1] / 1e12:.0f} "
        f"TFLOP/s, {hardware.memory_bandwidth / 1e12:.2f} TB/s of memory at {hardware.stream:.0%}, "
        f"{hardware.node_bandwidth / 1e9:.0f} GB/s in a node of {hardware.gpus_per_node} and "
        f"{hardware.network_bandwidth / 1e9:.0f} GB/s a network card at {hardware.collective:.0%}{measured}. "
        "A file with `extends: h100` and other values goes to --gpu."
    )


def show_layouts(result: SearchResult, hardware: Hardware) -> None:
    """Print the layouts that fit, the best first, and the recipe's values for the best one."""
    if not result.layouts:
        return
    Console().print(_layouts_table(result.layouts[:_LISTED], result.gpus))
    say(
        f"all predicted, GB on the fullest card; estimates are within {TIME_ERROR:.0%} of a whole trace's time and "
        f"{MEMORY_ERROR:.0%} of its memory\n{len(result.layouts)} layouts fit; the best one's values:\n"
        f"{' '.join(result.overrides(result.layouts[0])) or 'as in the recipe'}"
    )
    say(_assumptions(hardware))


def _layouts_table(layouts: Sequence[Layout], gpus: int) -> Table:
    stages = {each.forecast.recipe.parallel.zero_stage for each in layouts}
    title = f"{gpus} GPUs, ZeRO {', '.join(map(str, sorted(stages)))}"
    first = Column("ranks, micro-batch", no_wrap=True)
    table = Table(first, "step, s", "MFU", "GB", "left", "", box=box.SIMPLE_HEAD, title=title)
    for each in layouts:
        parallel, train = each.forecast.recipe.parallel, each.forecast.recipe.train
        chunks = f"x{parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        ranks = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context, "EP": parallel.expert}
        names = [f"{name} {size}{chunks * (name == 'PP')}" for name, size in ranks.items() if size > 1]
        names += [f"DP {gpus // parallel.model_size}", f"micro {train.micro_batch_size}"]
        names += [f"ZeRO {parallel.zero_stage}"] if len(stages) > 1 else []
        names += [f"recompute {train.recompute}"] if train.recompute != "none" else []
        table.add_row(
            ", ".join(names),
            f"{each.seconds:.2f}",
            f"{each.forecast.time.mfu:.1%}",
            f"{max(rank.card_bytes for rank in each.forecast.ranks) / 1e9:.1f}",
            f"{each.margin_bytes / 1e9:.1f}",
            "whole" if each.verified else "estimate",
        )
    return table
