"""Predict what a recipe needs and takes on a cluster, without one: its real code runs on fake devices."""
