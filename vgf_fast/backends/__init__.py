"""What computes the flows: PyTorch and C (``torch``), or the Triton kernels (``triton``)."""
