"""Alignment of a file of prompts: one line of results a prompt, and a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vgf_fast.common import locks
from vgf_fast.common.devices import choose_device
from vgf_fast.common.progress import progress_bar
from vgf_fast.config import MAX_SEED, TransportBudget, integer
from vgf_fast.llm.aligner import Aligner, TokenBudget
from vgf_fast.llm.baselines import BestOfN, TokenSearch
from vgf_fast.llm.data import Message, read_rows, render_chat
from vgf_fast.llm.embedding_flow import EmbeddingFlow
from vgf_fast.llm.reference_model import ReferenceModel
from vgf_fast.llm.reward import RewardModel


def read_prompts(path: Path, tokenizer: Any = None) -> list[str]:
    """Prompts of a file: one a line, or rows with ``prompt`` (text, or messages for the chat template).

    Raises ``ValueError`` for a file without prompts, or a row without one.
    """
    if path.suffix == ".txt":
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        prompts = []
        for number, row in enumerate(read_rows(path)):
            prompt: str | list[Message] | None = row.get("prompt")
            if not prompt:
                raise ValueError(f"{path}, row {number}: fields {', '.join(row)}; expected prompt")
            prompts.append(prompt if isinstance(prompt, str) else render_chat(tokenizer, prompt))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def finished(path: Path, settings: str) -> dict[int, str]:
    """Whole lines of an earlier run by prompt index; a line cut short by a kill is removed from the file.

    Raises ``ValueError`` for lines of a run with other settings or other prompts.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    found: dict[int, str] = {}
    for number, line in enumerate(data[:whole].decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            index, made_with, prompt = row["index"], row["settings"], row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not written by an alignment; give another file") from error
        if made_with != settings:
            raise ValueError(f"{path} was written with other settings: give another file, or remove it")
        found[index] = prompt
    return found


def align_file(
    aligner: Aligner,
    prompts: list[str],
    out: Path,
    budget: TransportBudget,
    *,
    num_particles: int,
    seed: int,
    settings: dict[str, Any],
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """Align the prompts that ``out`` does not have yet, a line of JSON each; returns how many those were.

    Prompt i is sampled with seed ``seed + i``, so that a run in parts gives what a run in one gives. A line is on disk
    before the next prompt begins. ``settings``: what the results depend on beside ``budget``, as JSON types.

    Raises ``ValueError`` for another run's file, and what the aligner raises.
    """
    key = json.dumps([settings, dataclasses.asdict(budget), num_particles, seed], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file, contextlib.ExitStack() as rows:
        if locks.lock(file.fileno()) is False:
            raise locks.InUseError(f"{out} is in use by another process: wait, or choose another file")
        done = finished(out, digest)
        for index, prompt in done.items():
            if index >= len(prompts) or prompts[index] != prompt:
                raise ValueError(f"{out} holds prompt {index} as {prompt[:40]!r}, which the prompts given do not")
        if done:
            report(f"going on after {len(done)} of {len(prompts)} prompts")
        left = [index for index in range(len(prompts)) if index not in done]
        advance = rows.enter_context(progress_bar("aligning", len(left), progress))
        for index in left:
            result = aligner.align([prompts[index]], budget=budget, num_particles=num_particles, seed=seed + index)
            best = result.best[0]
            row = {
                "index": index,
                "prompt": prompts[index],
                "text": best.text,
                "reward": best.reward,
                "responses": [dataclasses.asdict(response) for response in result.responses[0]],
                "transport": None if result.transport[0] is None else dataclasses.asdict(result.transport[0]),
                "method": result.method,
                "usage": dataclasses.asdict(result.usage),
                "seconds": result.seconds,
                "settings": digest,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            advance()
    return len(left)


def load_models(
    reference: str, reward: str, *, precision: str, device: str, label: int | None, max_tokens: int
) -> tuple[ReferenceModel, RewardModel]:
    """The two models of transformers, each with its own tokenizer.

    Raises ``ValueError`` naming the one that cannot be loaded, and what ``ReferenceModel`` and ``RewardModel`` raise.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    dtype = getattr(torch, precision)
    loaded = []
    for name, path, kind in (
        ("reference", reference, AutoModelForCausalLM),
        ("reward", reward, AutoModelForSequenceClassification),
    ):
        try:
            loaded.append((kind.from_pretrained(path, dtype=dtype).to(device), AutoTokenizer.from_pretrained(path)))
        except (OSError, ValueError) as error:
            raise ValueError(f"--{name} is {path!r}, which cannot be loaded: {error}") from error
    return (
        ReferenceModel(*loaded[0], max_tokens=max_tokens),
        RewardModel(*loaded[1], label=label, max_tokens=max_tokens),
    )


def align_paths(
    reference: str,
    reward: str,
    prompts: Path,
    out: Path,
    *,
    method: str,
    particles: int,
    steps: int,
    step_size: float,
    temperature: float,
    reward_units: int | None,
    trust_radius: float | None,
    fluency: float,
    svgd: bool,
    max_new_tokens: int,
    label: int | None,
    precision: str,
    max_tokens: int,
    seed: int,
    device: str | None,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """``align_file`` with models and prompts from files, as ``vgf-fast align``; how many prompts it aligned.

    Raises ``ValueError`` or ``FileNotFoundError`` naming what is wrong, before a model is loaded where that is known.
    """
    budget = TokenBudget(steps, step_size, temperature, trust_radius, reward_units)
    particles, max_new_tokens = integer("particles", particles, 1), integer("max_new_tokens", max_new_tokens, 1)
    max_tokens, seed = integer("max_tokens", max_tokens, 1), integer("seed", seed, 0, MAX_SEED)
    if not 0 <= fluency < math.inf:
        raise ValueError(f"fluency is {fluency}, expected a ratio of perplexities, or 0 for no bound")
    kinds: dict[str, Callable[..., Aligner]] = {
        "flow": functools.partial(EmbeddingFlow, svgd=svgd),
        "plain": functools.partial(EmbeddingFlow, svgd=svgd, mode="plain"),
        "best-of-n": BestOfN,
        "token-search": TokenSearch,
    }
    if method not in kinds:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, kinds))}")
    if not prompts.is_file():
        raise FileNotFoundError(f"no file of prompts at {prompts}")
    device = choose_device(device)
    models = load_models(reference, reward, precision=precision, device=device, label=label, max_tokens=max_tokens)
    aligner = kinds[method](models[1], reference=models[0], fluency=fluency or None, max_new_tokens=max_new_tokens)
    texts = read_prompts(prompts, models[0].vocabulary.tokenizer)
    settings = {
        "reference": reference, "reward": reward, "method": method, "fluency": fluency, "svgd": svgd,
        "max_new_tokens": max_new_tokens, "label": label, "precision": precision,
    }  # fmt: skip
    return align_file(
        aligner, texts, out, budget, num_particles=particles, seed=seed, settings=settings, progress=progress,
        report=report,
    )  # fmt: skip
