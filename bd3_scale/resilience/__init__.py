"""Keep a run whole through crashes, signals, full disks and broken terminals."""
