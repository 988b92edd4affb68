"""Runs: settings, the paper's presets, training in a directory, offline to online, reproduction, the demo."""
