"""What a person sees of a run: metrics, progress, loss curve, memory, environment."""
