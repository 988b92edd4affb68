"""A device that is not the CPU, without one: the CPU computes, and tensors that meet on two devices are an error."""

import contextlib
from unittest import mock

import torch
from torch.optim import optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

# A build for CPUs has no guard for "cuda", and code asks whether a device is the CPU.
DEVICE = torch.device("meta")
# What a GPU's tensors do with the CPU's.
ACROSS = ("aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::_index_put_impl_", "aten::index_put_")


class OnDevice(torch.Tensor):
    """A tensor of the CPU that says that it is the device's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    on_device = [one for one in given if isinstance(one, OnDevice)]
    name = function._schema.name
    if on_device and not name.startswith(ACROSS):
        others = [one for one in given if not isinstance(one, OnDevice) and one.ndim > 0]
        assert not others, f"{function} is given tensors on the device and on the cpu"
    device = kwargs.get("device")
    wrap = bool(on_device) if device is None else torch.device(device).type == DEVICE.type
    plain_args, plain = pytree.tree_map_only(OnDevice, lambda one: one.inner, (args, kwargs))
    if device is not None:
        plain = {**plain, "device": torch.device("cpu")}
    out = function(*plain_args, **plain)
    if not wrap:
        return out.clone() if name == "aten::_to_copy" and on_device else out
    out = pytree.tree_map_only(torch.Tensor, lambda one: one if isinstance(one, OnDevice) else OnDevice(one), out)
    return return_and_correct_aliasing(function, args, kwargs, out) if on_device else out


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return DEVICE if self.place.type == DEVICE.type else self.place


@contextlib.contextmanager
def gpu():
    """The device, inside this block."""
    with (
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", return_value=["cpu", DEVICE.type]),
        _Mode(),
    ):
        yield DEVICE
