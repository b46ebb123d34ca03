"""Train a model: the loop, its start and its resume."""
