"""All formats that the package reads documents in; importing this registers them."""

from bd3_scale.data import columns, json_values, sources

__all__ = ["columns", "json_values", "sources"]
