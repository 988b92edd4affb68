"""Preference data from local files, chat templates, and win rates with a judge."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vgf_fast.common.intervals import bootstrap_interval
from vgf_fast.llm.reward import Reward

Source = str | Path | Iterable[Mapping[str, Any]]  # a file, or rows such as a split of the ``datasets`` library
Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt, the response that people preferred (or the only one), and the other one where there is one."""

    prompt: str
    chosen: str | None
    rejected: str | None
    messages: tuple[Message, ...]  # the prompt as turns of a conversation


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file (``.jsonl``, ``.json``, either with ``.gz``) or a Parquet file (needs pyarrow).

    Raises ``ValueError`` for another ending, or a line that is no JSON object, naming it.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json")):
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {type(row).__name__}, expected an object")
            yield row


def _rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, or of a data set of the ``datasets`` library, with where each is."""
    if isinstance(source, (str, Path)):
        name, rows = str(source), read_rows(source)
    else:
        name, rows = type(source).__name__, (dict(row) for row in source)
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def load_tldr(source: Source) -> list[Preference]:
    """TL;DR in the layouts of its hubs, found by their fields.

    ``prompt`` and ``completion`` (trl-lib/tldr); ``prompt``, ``chosen`` and ``rejected`` (trl-lib/tldr-preference);
    ``info``, ``summaries`` and ``choice`` (openai/summarize_from_feedback, comparisons), whose prompt is written as in
    the others: SUBREDDIT, TITLE, POST, TL;DR.

    Raises ``ValueError`` for a row of another layout.
    """
    found = []
    for where, row in _rows(source):
        chosen: str | None
        rejected: str | None
        if "summaries" in row and "info" in row:
            info, texts = row["info"], [summary["text"] for summary in row["summaries"]]
            prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
            if len(texts) != 2 or row.get("choice") not in (0, 1):
                choice = row.get("choice")
                raise ValueError(f"{where}: {len(texts)} summaries and choice {choice!r}, expected 2 and 0 or 1")
            chosen, rejected = texts[row["choice"]], texts[1 - row["choice"]]
        elif "prompt" in row:
            prompt, chosen, rejected = row["prompt"], row.get("chosen", row.get("completion")), row.get("rejected")
        else:
            raise ValueError(f"{where}: fields {', '.join(row)}; expected prompt, or info and summaries")
        found.append(Preference(prompt, chosen, rejected, ({"role": "user", "content": prompt},)))
    return found


def parse_dialogue(text: str) -> list[Message]:
    """Turns of a dialogue written as ``\\n\\nHuman: ...\\n\\nAssistant: ...``.

    Raises ``ValueError`` for a text that does not begin with a turn.
    """
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError(f"dialogue begins with {text[:40]!r}, expected '\\n\\nHuman:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def load_hh(source: Source) -> list[Preference]:
    """Anthropic HH in its hub's layout: ``chosen`` and ``rejected``, whole dialogues that end with the assistant.

    The prompt is the dialogue up to and with the last ``\\n\\nAssistant:``. Where the rejected dialogue parts from the
    chosen one before that, ``rejected`` is None: it answers another prompt.

    Raises ``ValueError`` for a row of another layout, or one that does not end with the assistant.
    """
    found = []
    for where, row in _rows(source):
        if "chosen" not in row or "rejected" not in row:
            raise ValueError(f"{where}: fields {', '.join(row)}; expected chosen and rejected")
        cut = row["chosen"].rfind("\n\nAssistant:")
        messages = parse_dialogue(row["chosen"])
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the dialogue ends with the human, expected the assistant")
        prompt = row["chosen"][:cut] + "\n\nAssistant:"
        other: str | None = None
        rest = row["rejected"][len(prompt) :]
        if row["rejected"].startswith(prompt) and not _TURN.search(rest):
            other = rest.strip()
        found.append(Preference(prompt, messages[-1]["content"], other, tuple(messages[:-1])))
    return found


def render_chat(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The prompt in the tokenizer's chat template, up to where the assistant begins.

    The template writes the special tokens itself: give the reference and reward model ``prefix=[]`` with it.

    Raises ``ValueError`` when the tokenizer has no template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("tokenizer has no chat template, expected one: give prompts as plain text")
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Share of prompts won, ties counted half, with a bootstrap interval over prompts."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    agreement: float  # share of prompts on which the judge said the same in both orders


def win_rate(
    judge: Callable[[str, str, str], float],
    prompts: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """How often a judge prefers ``ours`` to ``theirs``.

    ``judge(prompt, first, second)`` returns 1 where the first is better, 0 where the second is, 0.5 for a tie. It is
    asked in both orders, since judges favour a place: a prompt is won or lost where the two answers together lean one
    way, a tie where they cancel.

    Raises ``ValueError`` for sequences of unequal lengths, none at all, or another verdict.
    """
    if not prompts or not len(prompts) == len(ours) == len(theirs):
        raise ValueError(
            f"prompts, ours and theirs have {len(prompts)}, {len(ours)} and {len(theirs)} entries, expected the same "
            "number, at least 1"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number in (0, 1)")
    points, agreed = [], 0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        verdicts = [judge(prompt, a, b), judge(prompt, b, a)]
        for verdict in verdicts:
            if verdict not in (0, 0.5, 1):
                raise ValueError(f"judge returned {verdict!r}, expected 1, 0.5 or 0")
        forth, back = verdicts[0], 1 - verdicts[1]
        agreed += forth == back
        lean = forth + back
        points.append(1.0 if lean > 1 else 0.0 if lean < 1 else 0.5)
    low, high = bootstrap_interval(points, confidence, seed)
    count = len(points)
    wins, losses = points.count(1.0), points.count(0.0)
    return WinRate(sum(points) / count, low, high, wins, count - wins - losses, losses, agreed / count)


def reward_judge(reward: Reward, tie_within: float = 0.0) -> Callable[[str, str, str], float]:
    """A judge for ``win_rate`` that prefers the response of higher reward; it is a tie within ``tie_within``."""
    encode = reward.vocabulary.encode

    def judge(prompt: str, first: str, second: str) -> float:
        values, _ = reward.evaluate([encode(prompt)] * 2, [encode(first), encode(second)])
        difference = float(values[0] - values[1])
        return 0.5 if abs(difference) <= tie_within else float(difference > 0)

    return judge
