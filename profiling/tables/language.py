"""Tables of language models: methods on MiniLM's pairs, some of their texts, and what the flow adds in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling.tables import NOT_YET, by_columns, load, named

Row = tuple[str, dict[str, Any]]  # a method, and the medians of its pairs
SHOWN = ("flow", "token search", "best of N")
TOKENS_CHANGE = ("flow", "plain", "token")  # beginnings of the names of methods that change tokens
# Column -> cell of a method; what follows the units is added by ``alignment``.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "medians": lambda row: row[0],
    "reward within the cap": lambda row: f"{row[1]['reward']:.3f}",
    "mean of the 8 best": lambda row: f"{row[1]['reward_mean_of_8']:.3f}",
    "any fluency": lambda row: f"{row[1]['reward_any']:.3f}",
    "keeps the cap": lambda row: f"{row[1]['within_bound']}",
    "perplexity / judge's": lambda row: f"{row[1]['perplexity_ratio']:.2f} / {row[1]['judge_ratio']:.2f}",
    "judge within 1.5": lambda row: f"{row[1]['judge_within_1.5']}",
    "distinct-2": lambda row: f"{row[1]['distinct_2']:.2f}",
    "% tokens changed": lambda row: f"{100 * row[1]['changed']:.0f}" if row[0].startswith(TOKENS_CHANGE) else "",
    "flow wins": lambda row: f"{row[1].get('flow_wins', '')}",
}


def _quoted(pair: dict[str, Any], name: str) -> str:
    method = pair["methods"][name]
    text = f"{pair['prompt']} {method['text']}".replace("|", "\\|")
    reward = "no response keeps the cap" if method["reward"] is None else f"{method['reward']:.2f}"
    return f"{text} ({reward}; judge {method['judge_ratio']:.1f})"


def _texts(pairs: list[dict[str, Any]]) -> str:
    """Texts of the best, the middle and the worst pair of the flow."""
    ranked = sorted(pairs, key=lambda pair: pair["methods"]["flow"]["reward"] or -1.0)
    chosen = {
        "highest reward": ranked[-1],
        "middle": ranked[len(ranked) // 2],
        "lowest": ranked[0],
        "judge likes it least": max(pairs, key=lambda pair: pair["methods"]["flow"]["judge_ratio"]),
    }
    columns: dict[str, Callable[[Row], str]] = {
        "flow's pair": lambda row: row[0],
        "target": lambda row: row[1]["target"],
        **{f"{name} (reward; judge's ratio)": lambda row, name=name: _quoted(row[1], name) for name in SHOWN},  # type: ignore[misc]
    }
    return by_columns(chosen.items(), columns)


def alignment(path: Path, overhead: Path, longer: Path) -> str:
    """Methods on MiniLM's pairs, texts of the best, the middle and the worst pair, and what the flow adds in time."""
    if not path.is_file():
        return NOT_YET
    record = load(path)
    flow, one, held_out = record["summary"]["flow"], record["example"], record["held_out_perplexity"]

    def spent(row: Row) -> str:
        return f"{row[1]['units']:.0f}" + "".join(f" / {row[1][k] / flow[k]:.2f}" for k in ("operations", "seconds"))

    parts = [
        f'It makes of "{one["prompt"]} {one["start_text"]}" (reward {one["start_reward"]:.2f}, perplexity '
        f'{one["start_perplexity"]:.0f}) "{one["prompt"]} {one["text"]}" ({one["reward"]:.2f}, '
        f"{one['perplexity']:.0f}).",
        by_columns(record["summary"].items(), COLUMNS | {"units / operations / time": spent}),
        f"{len(record['pairs'])} pairs, counts are of them; {record['units']} units of the reward model a pair, "
        f"{record['particles']} responses in flow and search; `equal operations`: as many as the flow spends in all "
        "models, or the same run where that is more. Operations and time are multiples of the flow's, perplexities of "
        "the median of a pair's first responses. Held-out perplexity of the reference model "
        f"{held_out['reference']:.0f}, of the judge {held_out['judge']:.0f}.",
        _texts(record["pairs"]),
        f"Record: {named(path)} ({record['date'][:10]}, {record['device']}), from `{record['command']}`.",
    ]
    if longer.is_file():
        more = load(longer)
        rewards = ", ".join(f"{name} {row['reward']:.3f}" for name, row in more["summary"].items())
        wins = " and ".join(f"{row['flow_wins']} ({name})" for name, row in more["summary"].items() if name != "flow")
        parts.append(
            f"With {more['units']} units the rewards within the cap are: {rewards}. The flow wins {wins} of "
            f"{len(more['pairs'])} pairs, the judge is within 1.5 in {more['summary']['flow']['judge_within_1.5']}. "
            f"Record: {named(longer)}, from `{more['command']}`."
        )
    if overhead.is_file():
        cost = load(overhead)
        parts.append(
            "Beside the models' passes, an align step spends on flow, projection and bookkeeping "
            f"{100 * cost['base']['added']:.0f} % more with models of the sizes of GPT-2 and BERT base, "
            f"{100 * cost['small']['added']:.0f} % with the small ones here. Record: "
            f"{named(overhead)} ({cost['date'][:10]}, {cost['device']}, one thread), from `{cost['command']}`."
        )
    return "\n\n".join(parts)
