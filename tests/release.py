"""The public release's numbers in tests/data, as tensors and modules."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vgf_fast.networks import EnsembleMLP, VelocityField
from vgf_fast.reference_checkpoint import load_mlp

DATA = Path(__file__).parent / "data"
FLOWS = ("paper_small", "min_agg_gelu", "noln_swish", "single_particle", "odd_sizes")


class ReleaseFlow(NamedTuple):
    """One flow of the release, from noise to the chosen action, with the networks that made it."""

    meta: dict
    arrays: dict[str, torch.Tensor]
    critic: EnsembleMLP
    target_critic: EnsembleMLP
    velocity: VelocityField

    def __getitem__(self, name):
        return self.arrays[name]


def load_flow(name, dtype=torch.float64):
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(bytes(arrays.pop("meta")))
    sizes, hidden = (meta["O"], meta["A"]), tuple(meta["hidden"])
    critic, target = (EnsembleMLP(*sizes, hidden, meta["E"], meta["layer_norm"], meta["activation"]) for _ in range(2))
    velocity = VelocityField(*sizes, hidden, False, meta["activation"])
    for module, prefix in ((critic, "critic"), (target, "target_critic"), (velocity, "bc")):
        load_mlp(module, arrays, prefix)
        module.to(dtype)
    tensors = {
        key: torch.from_numpy(value).to(dtype if value.dtype.kind == "f" else torch.int64)
        for key, value in arrays.items()
        if "/" not in key
    }
    return ReleaseFlow(meta, tensors, critic, target, velocity)


def below(prefix, arrays):
    """The arrays whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def relative_error(value, truth):
    """Largest difference over the largest entry of the truth."""
    assert value.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    error = (value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-300)
    return error.item()
