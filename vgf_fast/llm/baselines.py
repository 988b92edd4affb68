"""Baselines in the flow's own call signature, and a table that sets methods side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgf_fast.config import TransportBudget
from vgf_fast.llm.aligner import Aligner, Run
from vgf_fast.llm.reference_model import ReferenceModel
from vgf_fast.llm.result import AlignResult
from vgf_fast.llm.reward import Reward


class BestOfN(Aligner):
    """Sample and keep the best: as many samples as ``budget.reward_units``, else ``num_particles``."""

    method = "best of N"

    def _samples(self, budget: TransportBudget, num_particles: int) -> int:
        return getattr(budget, "reward_units", None) or num_particles

    def _improve(self, run: Run, budget: TransportBudget) -> None:
        run.evaluate(range(len(run.particles)), False, budget)


class TokenSearch(Aligner):
    """Greedy swaps of one token: proposed by the reward's first-order change, checked under the reference, verified.

    A round of a particle takes the gradient at its text (two units), ranks swaps over all positions and the whole
    vocabulary by g (E_v - E_current), leaves out those that the left context alone makes too unlikely, scores
    ``proposals`` of them under the reference model, and evaluates the ``verify`` best within the bound (a unit each).
    It goes to the best if that is better; else the next ones are verified. ``budget.steps`` rounds, or as many as
    ``budget.reward_units`` pay for. Raises ``ValueError`` naming an argument out of its range.
    """

    method = "first-order token search"

    def __init__(
        self,
        reward_model: Reward | nn.Module,
        tokenizer: Any = None,
        *,
        reference: ReferenceModel | nn.Module | None = None,
        proposals: int = 64,
        verify: int = 4,
        slack: float = 4.0,
        **arguments: Any,
    ) -> None:
        super().__init__(reward_model, tokenizer, reference=reference, **arguments)
        if self.reference is None:
            raise ValueError("reference is None, expected a causal language model: swaps are checked under it")
        if proposals < 1 or verify < 1:
            raise ValueError(f"proposals is {proposals} and verify is {verify}, expected positive numbers")
        self.proposals = proposals
        self.verify = verify
        self.slack = slack  # nats that the right context may give back

    def _improve(self, run: Run, budget: TransportBudget) -> None:
        indices = list(range(len(run.particles)))
        if budget.steps == 0:
            run.evaluate(indices, False, budget)
            return
        active = run.begin(budget)
        waiting: dict[int, list[tuple[int, ...]]] = {}  # swaps not yet verified at a particle's text
        for _ in range(budget.steps):
            for i in active:
                if i not in waiting:
                    waiting[i] = self._swaps(run, i)
            chosen = {i: waiting[i][: self.verify] for i in active}
            active = [i for i in active if chosen[i]]
            for i in list(active):
                particle, here = run.particles[i], run.particles[i].ids
                reward = run.rewards[particle.prompt, here]
                waiting[i] = waiting[i][self.verify :]
                found: list[tuple[float, tuple[int, ...]]] = []
                for ids in chosen[i]:
                    particle.ids = ids
                    if run.evaluate([i], False, budget):
                        found.append((run.rewards[particle.prompt, ids], ids))
                particle.ids = here
                if not found:
                    active.remove(i)
                elif max(found)[0] > reward:
                    particle.ids = max(found)[1]
                    del waiting[i]
            moved = [i for i in active if i not in waiting]
            reached = set(run.evaluate(moved, True, budget))
            active = [i for i in active if i in waiting or i in reached]
            if not active:
                break

    def _swaps(self, run: Run, index: int) -> list[tuple[int, ...]]:
        """Responses one swap away, within the bound, of greatest first-order gain first."""
        assert self.reference is not None
        particle = run.particles[index]
        key = (particle.prompt, particle.ids)
        context, ids = run.contexts[particle.prompt], list(particle.ids)
        table = self.reward.table.float()
        now = torch.tensor(ids, dtype=torch.long, device=table.device)
        gradient = run.gradients[key]
        gain: Tensor = gradient @ table.T - (gradient * table[now]).sum(-1, keepdim=True)
        run.usage.vocabulary_rows += len(ids)
        gain[:, ~(self.vocabulary.allowed & ~self.vocabulary.continues)] = -torch.inf
        # A word of several pieces is not swapped in part.
        pieces = self.vocabulary.continues[now]
        gain[pieces | torch.cat([pieces[1:], pieces.new_zeros(1)])] = -torch.inf
        gain.scatter_(1, now[:, None], -torch.inf)
        bound = run.bounds[index]
        if bound is not None:
            likely = self.reference.conditionals(context, ids, run.usage)
            lost = likely - likely.gather(1, now[:, None])
            least = -torch.tensor(bound, dtype=torch.float32, device="cpu").log().item() * (len(ids) + 1)
            gain[lost + run.log_probabilities[key] + self.slack < least] = -torch.inf
        best = gain.flatten().topk(min(self.proposals, gain.numel()))
        texts = []
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value > 0:
                position, token = divmod(place, gain.shape[1])
                swapped = (*ids[:position], token, *ids[position + 1 :])
                if self.vocabulary.comes_back(list(swapped)):
                    texts.append(swapped)
        run.score([(particle.prompt, text) for text in texts])
        return [text for text in texts if run.feasible(index, text)]


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among all n-grams of ids; 0 without any."""
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def summary(
    result: AlignResult, encode: Callable[[str], list[int]], judge: Callable[[str, str], float] | None = None
) -> dict[str, float | None]:
    """Figures of a result, medians over prompts.

    ``judge``: perplexity of (prompt, response) under a model that took no part.
    """
    best = result.best
    rows = result.responses

    def middle(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return statistics.median(known) if known else None

    kept = [[r for r in responses if r.feasible] or responses for responses in rows]
    return {
        "reward_best": middle([r.reward for r in best]),
        "reward_mean": middle([statistics.fmean(r.reward for r in responses) for responses in kept]),
        "perplexity": middle([r.perplexity for r in best]),
        "judge_perplexity": middle(
            [judge(p, r.text) for p, r in zip(result.prompts, best, strict=True)] if judge else []
        ),
        "distinct_2": middle([distinct([encode(r.text) for r in responses], 2) for responses in rows]),
        "changed": middle([r.tokens_changed / r.tokens for r in best]),
        "feasible": statistics.fmean(r.feasible for r in best),
        "reward_units": result.usage.reward_units / len(rows),
        "reference_tokens": result.usage.reference_tokens / len(rows),
        "seconds": result.seconds / len(rows),
    }


def compare(
    methods: Mapping[str, Aligner],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]] | None = None,
    *,
    budget: TransportBudget | None = None,
    judge: Callable[[str, str], float] | None = None,
    show: Callable[[str], None] | None = print,
    **arguments: Any,
) -> dict[str, AlignResult]:
    """Align the same prompts by every method under one budget, show a table of ``summary``, return the results."""
    results: dict[str, AlignResult] = {}
    lines: list[list[str]] = []
    for name, method in methods.items():
        results[name] = method.align(prompts, responses, budget=budget, **arguments)
        figures = summary(results[name], method.vocabulary.encode, judge)
        if not lines:
            lines.append(["method", *figures])
        lines.append([name, *("-" if value is None else f"{value:.4g}" for value in figures.values())])
    if show is not None:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
        for line in lines:
            show("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return results
