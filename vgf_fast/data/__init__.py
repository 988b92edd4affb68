"""Files and suites to transitions on a device."""

from vgf_fast.data.dataset import Dataset

__all__ = ["Dataset"]
