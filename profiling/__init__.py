"""Benchmarks of vgf_fast against its peers. Not installed with the package: run from the repository's root."""
