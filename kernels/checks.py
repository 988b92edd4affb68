"""Checks of networks and of what goes with them, made before anything is launched; each names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import launch
from .packing import PackedMLP

if TYPE_CHECKING:
    from .sequence import Select, TDTarget


def check_rows(mlp: PackedMLP, observations: Tensor, rows: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless observations [B, O] and the rows called ``name``, [B, N, A], suit the network."""
    launch.check_device(name, rows)
    launch.check_shape(
        "observations", observations, (observations.shape[0], mlp.observation_dim), "states, and the network's width"
    )
    launch.check_shape(
        name, rows, (observations.shape[0], *rows.shape[1:2], mlp.action_dim), "states, particles, the network's width"
    )
    if not 1 <= rows.shape[1] <= launch.MAX_PARTICLES:
        raise ValueError(f"{name} has {rows.shape[1]} particles a state, expected 1 to {launch.MAX_PARTICLES}")
    if mlp.action_dim > launch.MAX_ACTION_DIM:
        raise ValueError(f"{name} has {mlp.action_dim} columns, expected at most {launch.MAX_ACTION_DIM}")
    if mlp.padded_width > launch.MAX_WIDTH:
        raise ValueError(
            f"the widest hidden layer takes {mlp.padded_width} columns, expected {launch.MAX_WIDTH} or less"
        )
    for key, tensor in (("observations", observations), (name, rows)):
        launch.check_dtype(key, tensor, launch.PARTICLE_DTYPES)
        launch.check_same_device(key, tensor, "the network", mlp.state.device)


def check_critic(mlp: PackedMLP, name: str = "mlp", like: PackedMLP | None = None) -> None:
    """Raise ``ValueError`` for a network that is no critic: of more outputs than one, or with a time.

    ``like`` is a critic whose sizes, dtype and device it must have.
    """
    if mlp.head.shape[2] != 1:
        raise ValueError(f"{name} has {mlp.output_dim} outputs in {mlp.head.shape[2]} columns, expected a critic's one")
    if like is None:
        return
    for ours, theirs in zip(like.tensors, mlp.tensors, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.device != theirs.device:
            raise ValueError(
                f"{name} has weights of shape {tuple(theirs.shape)} and dtype {theirs.dtype} where mlp has "
                f"{tuple(ours.shape)} and {ours.dtype}, expected the same"
            )


def check_seed(seed: Tensor, observations: Tensor) -> None:
    """Raise ``ValueError`` unless ``seed`` is one int64 beside the observations."""
    launch.check_shape("seed", seed, (1,), "one number")
    launch.check_dtype("seed", seed, (torch.int64,))
    launch.check_same_device("seed", seed, "observations", observations.device)


def check_ending(epilogue: Select | TDTarget, batch: int, device: torch.device) -> None:
    """Raise ``ValueError`` naming what is wrong of it, for ``batch`` states on a device."""
    from .sequence import TDTarget

    launch.check_choice("epilogue.q_aggregation", epilogue.q_aggregation, launch.AGGREGATIONS)
    if isinstance(epilogue, TDTarget):
        launch.check_choice("epilogue.reduce", epilogue.reduce, launch.REDUCTIONS)
        for name, tensor in (("rewards", epilogue.rewards), ("masks", epilogue.masks)):
            launch.check_shape(name, tensor, (batch,), "one number a state")
            launch.check_dtype(name, tensor, launch.SIGNAL_DTYPES)
            launch.check_same_device(name, tensor, "particles", device)
        return
    launch.check_choice("epilogue.mode", epilogue.mode, launch.SELECTIONS)
    launch.check_positive("epilogue.temperature", epilogue.temperature)
    if epilogue.mode != "max":
        if epilogue.uniform is None:
            raise ValueError(f"uniform is None, expected one number a state: mode={epilogue.mode!r}")
        launch.check_shape("uniform", epilogue.uniform, (batch,), "one number a state")
        launch.check_dtype("uniform", epilogue.uniform, (torch.float32,))
        launch.check_same_device("uniform", epilogue.uniform, "particles", device)
