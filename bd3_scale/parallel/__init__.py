"""Make process groups and the DeepSpeed engine with its optimisers, and run megatron-core on CPU."""
