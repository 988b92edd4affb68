"""The budget curve: return against the number of flow steps, of one trained policy, with a plot.

``vgf-fast demo`` leaves a policy in demo/policy; then ``python budget_curve.py`` evaluates it. Any policy and Gymnasium
environment will do: ``--policy runs/hopper/policy --env Hopper-v4``. It needs the extras ``envs`` and ``train``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
from matplotlib.figure import Figure

import vgf_fast as vgf


def main() -> None:
    """Evaluate every budget on the same episodes, and draw mean and interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("demo/policy"))
    parser.add_argument("--env", default="Reacher-v5")
    parser.add_argument("--flow-steps", type=int, nargs="+", default=[0, 1, 2, 3, 5, 8, 12, 16, 20])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("budget_curve.png"))
    options = parser.parse_args()

    policy = vgf.VGFPolicy.from_pretrained(options.policy)
    results = vgf.evaluate(
        policy,
        lambda: gymnasium.make(options.env),
        episodes=options.episodes,
        flow_steps=options.flow_steps,
        behavior_cloning=True,
    )
    for result in results:
        print(f"{result.label}: {result.return_mean:.2f} ({result.return_low:.2f} to {result.return_high:.2f})")

    cloning, *flows = results
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    axes.axhline(cloning.return_mean, color="grey", linestyle=":", label="behaviour cloning")
    steps = [result.flow_steps for result in flows]
    axes.plot(steps, [result.return_mean for result in flows], marker="o", label="value gradient flow; 0 is best of N")
    axes.fill_between(
        steps, [result.return_low for result in flows], [result.return_high for result in flows], alpha=0.2
    )
    trained = policy.config.train_budget.steps
    axes.axvline(trained, color="grey", linewidth=0.8, label=f"budget of the training, {trained}")
    axes.set(xlabel="flow steps when acting", ylabel="return of an episode", title=options.env)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=150)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
