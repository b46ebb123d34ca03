"""What a recipe will need and take on a cluster, found out without one: its real code runs on fake devices."""
