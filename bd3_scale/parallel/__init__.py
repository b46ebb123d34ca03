"""Process groups, the DeepSpeed engine, and what megatron-core needs to run on CPU."""
