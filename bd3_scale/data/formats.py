"""Register all document formats of the package, by importing them."""

from bd3_scale.data import columns, json_values, sources

__all__ = ["columns", "json_values", "sources"]
