"""Noise schedule, counter-based noise and the NELBO."""
