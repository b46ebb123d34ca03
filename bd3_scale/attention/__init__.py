"""Spans, attention of both streams under the block diffusion mask, and decoding."""
