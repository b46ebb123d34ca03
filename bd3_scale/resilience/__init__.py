"""What keeps a run whole: stop signals, the run directory's lock, files complete or absent."""
