"""Triton kernels of vgf_fast, imported as ``vgf_fast.kernels``; importing this imports no Triton."""

if __name__ == "kernels":
    raise ImportError("these kernels are imported as vgf_fast.kernels; the name 'kernels' belongs to another package")
