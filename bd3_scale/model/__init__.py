"""The block diffusion transformer on megatron-core layers."""
