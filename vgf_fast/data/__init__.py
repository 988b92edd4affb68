"""Datasets of transitions: device-resident storage, OGBench files, and their generation in the simulator."""

from vgf_fast.data.dataset import Dataset

__all__ = ["Dataset"]
