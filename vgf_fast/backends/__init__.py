"""What computes the flows: PyTorch and C (``torch``), or the Triton kernels (``triton``).

``choice.bound`` binds a policy where it is to one of the two, which then does all of its acting and learning.
"""
