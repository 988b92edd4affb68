"""What may be given to a policy by mistake, in Python."""

import numpy as np
import pytest
import torch

import vgf_fast as vgf


def test_a_name_is_no_environment():
    with pytest.raises(TypeError, match="env is 'Reacher-v5', expected a Gymnasium environment, as gymnasium.make"):
        vgf.VGFPolicy.for_env("Reacher-v5")


@pytest.mark.parametrize("given", ["abc", None, {"a": 1}, np.array(["a"]), np.zeros(4, "M8[s]"), np.zeros(4, complex)])
def test_what_is_no_number(given):
    policy = vgf.VGFPolicy(vgf.VGFConfig(4, 2, hidden_dims=(8,), behavior_hidden_dims=(8,)))
    with pytest.raises(
        TypeError, match=f"observations (is a {type(given).__name__}|has dtype .*), expected (real )?numbers"
    ):
        policy.sample_actions(given)


def test_arrays_are_no_dataset():
    learner = vgf.Learner(vgf.VGFPolicy(vgf.VGFConfig(4, 2, hidden_dims=(8,), behavior_hidden_dims=(8,))))
    with pytest.raises(TypeError, match="dataset is a dict, expected a Dataset: vgf_fast.data.Dataset.from_arrays"):
        learner.fit({"observations": np.zeros((3, 4))}, 1)
    batch = {
        "observations": torch.zeros(3, 4),
        "actions": torch.zeros(3, 2),
        "next_observations": torch.zeros(3, 4),
        "rewards": torch.zeros(3, device="meta"),
        "masks": torch.ones(3),
    }
    with pytest.raises(ValueError, match=r"batch\['rewards'\] is on meta, but the policy is on cpu"):
        learner.update(batch)
