"""Process groups, the DeepSpeed engine and its optimisers, and what megatron-core needs to run on CPU."""
