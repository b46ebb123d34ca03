"""The modelling code that lies beside the weights of an export and runs in transformers without this package."""

from __future__ import annotations

from importlib.resources import files

from bd3_scale.convert.architectures import EXPORT_FORMATS, Format

_MODULES = ("configuration", "modeling", "mlp", "generation")


def remote_code(kind: Format) -> dict[str, str]:
    """File name → source text of the modules that make up a format that has code.

    They are one source: SDAR, dense or with experts, is this model with the names that engines look for, and LLaDA2
    has modules of its own beside it, for its weights have other names.
    """
    if kind == "llada2":
        own = {f"{name}_llada2_moe.py": _read(f"{name}_llada2_moe.py") for name in ("configuration", "modeling")}
        return remote_code("bd3") | own
    prefix = EXPORT_FORMATS[kind].prefix
    sources = {f"{name}_{kind}.py": _read(f"{name}_bd3.py") for name in _MODULES}
    return {name: text.replace("Bd3", prefix).replace("bd3", kind) for name, text in sources.items()}


def _read(name: str) -> str:
    return (files("bd3_scale.convert") / "remote_code" / name).read_text(encoding="utf-8")
