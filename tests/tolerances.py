"""The one table of error bounds of the kernels, and the rule they are held to.

Errors are against a float64 truth computed from the very inputs the kernel reads, relative to a scale: the largest sum
of the absolute values of the terms that an output is made of, which is what rounding is proportional to.

``BOUNDS`` is name -> dtype of the output -> largest relative error. Besides, a kernel may err at most twice as much as
the same formula in PyTorch's own operations in that dtype; ``FLOOR``, one unit in the last place of the scale, is added
because PyTorch is now and then exact by luck, and no sum in that dtype can promise to be.
"""

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

BOUNDS = {
    "svgd_direction": {F32: 1e-6},
    "svgd_step": {F32: 1e-6, BF16: 2**-7, F16: 2**-10},
    "svgd_moment": {F32: 1e-6},
    # Against the release's float64 run itself: rounding its particles to float32 moves distances, hence the kernel.
    "release_direction": {F32: 1e-5},
    "release_particles": {F32: 1e-5},
    # Relative to the largest entry: sums over as many terms as a layer is wide, one layer after another.
    "critic_value": {F32: 2e-6},
    "critic_score": {F32: 4e-6},
    "behavior_flow": {F32: 2e-6},
    "training_loss": {F32: 1e-6},
    "training_gradient": {F32: 4e-6},
    # Relative to the step: Adam divides by the root of a gradient's square, however small.
    "adam_step": {F32: 1e-4},
    # Of whole updates: against the torch backend, and of the release's three, relative to how far Adam moved.
    "update_parameters": {F32: 1e-5},
    "update_moments": {F32: 2e-5},
    "update_metrics": {F32: 1e-6},
    "update_step": {F32: 2e-4},
    "flow_step": {F32: 1e-5},
    # Relative to the largest entry, through several steps, each of which magnifies the rounding of the one before.
    "flow_gradient": {F32: 1e-4},
    # Against the release's float64 run: its networks rounded to float32.
    "release_score": {F32: 1e-5},
    "release_trajectory": {F32: 1e-4},
    "aggregate": {F32: 2.5e-7, BF16: 2**-7, F16: 2**-10},
    "td_target": {F32: 5e-7},
    "cumulative_probability": {F32: 1e-6},
    # Relative to the sum of the absolute terms of each score.
    "nearest_score": {F32: 2e-6},
    "token_svgd_direction": {F32: 1e-6},
}
FLOOR = {F32: 2**-23, BF16: 2**-7, F16: 2**-10}


def assert_accurate(name, value, truth, plain, scale):
    """Hold ``value`` to its bound and to twice the error of ``plain``, against ``truth`` and relative to ``scale``."""
    dtype = value.dtype
    assert value.shape == truth.shape == plain.shape
    assert plain.dtype == dtype
    if value.numel() == 0:
        return
    error = ((value.double() - truth).abs() / scale).max().item()
    plain_error = ((plain.double() - truth).abs() / scale).max().item()
    assert error <= BOUNDS[name][dtype], f"{name}: error {error:.2e}, bound {BOUNDS[name][dtype]:.2e}"
    limit = 2.0 * plain_error + FLOOR[dtype]
    assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {plain_error:.2e}"


def within_twice(value, plain, truth):
    """Hold a kernel's root mean square error to twice that of PyTorch's operations in the same dtype of products.

    Over many entries, of which the largest error would be a matter of luck.
    """
    assert value.shape == plain.shape == truth.shape
    ours, theirs = ((t.double() - truth).square().mean().sqrt().item() for t in (value, plain))
    assert ours <= 2.0 * theirs, f"error {ours:.2e}, PyTorch's {theirs:.2e}"
