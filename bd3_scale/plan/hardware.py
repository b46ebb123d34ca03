"""Describe the hardware of a plan: values of data sheets, and the share of them that is expected in practice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from bd3_scale.recipe.plain_yaml import LIMIT_BYTES, parse_yaml
from bd3_scale.recipe.schema import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share
from bd3_scale.resilience.readers import read_regular, reader

PositiveShare = Annotated[float, Field(gt=0, le=1)]
KNOWN = Path(__file__).with_suffix(".yaml")


class Hardware(Section):
    """One type of GPU in its node; `hardware.yaml` explains each value, with its unit."""

    device: str
    peak_flops: PositiveFloat | None = Field(None, description="dense bf16, FLOP/s; default: of the device")
    fp32_flops: PositiveFloat = Field(67.0e12, description="of products of fp32 matrices, FLOP/s; default: H100's")
    memory_gb: PositiveFloat
    memory_bandwidth: PositiveFloat
    gpus_per_node: PositiveInt
    node_bandwidth: PositiveFloat
    network_bandwidth: PositiveFloat
    price: NonNegativeFloat
    matmul: PositiveShare
    attention: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)]
    stream: PositiveShare
    collective: PositiveShare
    launch_seconds: NonNegativeFloat
    latency_seconds: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)]
    overhead_gb: NonNegativeFloat
    fragmentation: Share
    host_bandwidth: PositiveFloat
    storage_bandwidth: PositiveFloat
    measured: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="values that were measured")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)

    @property
    def peak(self) -> float:
        """Return the dense bf16 FLOP/s."""
        from bd3_scale.observe.flops import peak_of

        peak = self.peak_flops or peak_of(self.device)
        assert peak is not None, "checked when it was read"
        return peak


@reader("a GPU", path="name")
def load_hardware(name: str) -> Hardware:
    """Return a type of GPU by its name in `hardware.yaml`, or from a YAML file with the values of one.

    Such a file may say `extends: h100` and give only the values that differ.

    ValueError: there is no GPU of that name, or the file is wrong.
    """
    from bd3_scale.observe.flops import peak_of

    known: dict[str, dict[str, Any]] = parse_yaml(KNOWN.read_bytes())
    path = Path(name)
    if name.lower() in known:
        entry, source = known[name.lower()], name
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        try:
            entry, source = parse_yaml(read_regular(path, LIMIT_BYTES)), str(path)
        except ValueError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{path} does not describe a GPU: give keys and values, as in {KNOWN.name}")
    else:
        raise ValueError(f"--gpu {name} is neither one of {', '.join(known)} nor a YAML file that describes a GPU")
    try:
        while (base := entry.pop("extends", None)) is not None:
            if not isinstance(base, str) or base.lower() not in known:
                raise ValueError(f"{source}: extends {base!r}, and must extend one of {', '.join(known)}")
            entry = {**known[base.lower()], **entry}
        hardware = Hardware(**entry)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"{source}: {problems}") from None
    if hardware.peak_flops is None and peak_of(hardware.device) is None:
        raise ValueError(f"{source}: the peak of {hardware.device!r} is not known: give peak_flops")
    return hardware
