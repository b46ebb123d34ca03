"""Starting a run's processes: on this machine, or through SLURM."""
