"""An OpenAI-compatible server for block diffusion."""
