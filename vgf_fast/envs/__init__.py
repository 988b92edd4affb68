"""Simulators: environments side by side, evaluation in them, data sets generated in them, and tasks by name."""
