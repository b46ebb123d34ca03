"""Serve block diffusion models over an OpenAI-compatible HTTP API."""
