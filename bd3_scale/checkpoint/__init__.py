"""Sharded, topology-free checkpoints: complete or absent."""
