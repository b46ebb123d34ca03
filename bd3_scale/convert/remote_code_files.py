"""Provide the modelling code that lies next to an export's weights and runs in transformers without this package."""

from __future__ import annotations

from importlib.resources import files

from bd3_scale.convert.architectures import EXPORT_FORMATS, Format

_MODULES = ("configuration", "modeling", "mlp", "generation")


def remote_code(kind: Format) -> dict[str, str]:
    """Return the modules of a format that has code, by file name.

    All formats share one source. SDAR, dense or with experts, is the same model under the class and file names that
    engines look for. LLaDA2 adds two modules, since its weights have other names.
    """
    if kind == "llada2":
        llada2 = {f"{name}_llada2_moe.py": _read(f"{name}_llada2_moe.py") for name in ("configuration", "modeling")}
        return remote_code("bd3") | llada2
    prefix = EXPORT_FORMATS[kind].prefix
    sources = {f"{name}_{kind}.py": _read(f"{name}_bd3.py") for name in _MODULES}
    return {name: text.replace("Bd3", prefix).replace("bd3", kind) for name, text in sources.items()}


def _read(name: str) -> str:
    return (files("bd3_scale.convert") / "remote_code" / name).read_text(encoding="utf-8")
