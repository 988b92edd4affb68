"""Triton kernels of vgf_fast, imported as ``vgf_fast.kernels``. Nothing here imports Triton until a kernel is asked for."""

if __name__ == "kernels":
    raise ImportError("these kernels are imported as vgf_fast.kernels; the name 'kernels' belongs to another package")
