"""Likelihood of held-out text."""
