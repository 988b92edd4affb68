"""Tables of what was learnt: tasks by method, runs taken online, the demo, and the demo beside the public release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from profiling.tables import NOT_YET, load_all, named, table

PAIR = ("ours", "release")
Outcome = dict[str, Any]


def _score(outcome: Outcome) -> str:
    return f"{outcome['mean']:.1f} ({outcome['low']:.1f} to {outcome['high']:.1f})"


def _return(outcome: Outcome) -> str:
    return f"{outcome['return_mean']:.1f} ({outcome['return_low']:.1f} to {outcome['return_high']:.1f})"


def _gain(outcome: Outcome) -> str:
    sign = "+" if outcome["mean"] >= 0 else ""
    return sign + _score(outcome)


def _with_steps(task: Outcome, steps: int) -> str:
    return f"L = {steps}: {_score(task['methods'][f'L={steps}'])}"


# Row -> cell of a task, a column each.
LEARNED: dict[str, Callable[[Outcome], str]] = {
    "the data's own trajectories": lambda task: _score(task["data"]),
    "behaviour cloning": lambda task: _score(task["methods"]["bc"]),
    "L = 0, best of N": lambda task: _score(task["methods"]["L=0"]),
    "VGF, L of the training": lambda task: _with_steps(task, task["fixed"]),
    "VGF, best L by these numbers": lambda task: _with_steps(task, task["best"]),
    "L of the training over L = 0, seed by seed": lambda task: _gain(task["gain"]),
    "seeds, episodes each": lambda task: f"{len(task['seeds'])}, {task['settings']['run']['eval_episodes']}",
}
VERDICTS: dict[str, Callable[[Outcome], bool]] = {
    "The L of the training beats best of N in": lambda gain: gain["low"] > 0,
    "The L of the training loses to best of N in": lambda gain: gain["high"] < 0,
    "The interval of its gain includes 0 in": lambda gain: gain["low"] <= 0 <= gain["high"],
}


def learned(folder: Path) -> str:
    """The flow against best-of-N, behaviour cloning and the data, a task a column, and where it does not win."""
    tasks = [record for record in load_all(folder, "*.json").values() if "methods" in record]
    if not tasks:
        return NOT_YET
    rows = [[title, *map(cell, tasks)] for title, cell in LEARNED.items()]
    verdicts = {text: [task["task"] for task in tasks if holds(task["gain"])] for text, holds in VERDICTS.items()}
    told = " ".join(f"{text} {_listed(names)}." for text, names in verdicts.items() if names)
    tuning = "; ".join(f"{task['task']}: {task['tuning']}" for task in tasks)
    files = named(*(folder / f"{task['task']}.json" for task in tasks))
    made = ", ".join(f"`{task['data_command']}`" for task in tasks)
    header = ["", *(f"{task['task']}, {task['metric']}" for task in tasks)]
    return (
        f"{table(header, rows)}\n\n{told} "
        "95 % intervals over seeds, those of the data over its trajectories. "
        f"Settings were chosen on these tasks ({tuning}). "
        f"Records: {files}, from `python -m profiling.learning TASK --data DIR`, on data of {made}."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def online(folder: Path) -> str:
    """Scores against steps in the simulator, for the runs that were taken online."""
    parts = []
    for path, record in load_all(folder, "*-online.json").items():
        labels = list(next(iter(record["scores"].values())))
        header = [f"{record['task']}, steps in the simulator", *(f"{label}, {record['metric']}" for label in labels)]
        rows = [
            [f"{int(step):,}", *(_score(by_label[label]) for label in labels)]
            for step, by_label in record["scores"].items()
        ]
        about = f"{len(record['seeds'])} seeds, 95 % intervals over seeds."
        parts.append(f"{table(header, rows)}\n\n{about} Record: {named(path)}, from `{record['command']}`.")
    return "\n\n".join(parts) or NOT_YET


def demonstration(folder: Path) -> str:
    """Returns of the demo, a column for each seed."""
    records = load_all(folder, "reacher_seed*.json")
    rows = [["the data's own controller", *(_return(record["data"]) for record in records.values())]]
    for results in zip(*(record["results"] for record in records.values()), strict=True):
        rows.append([_setting(results[0]["label"]), *map(_return, results)])
    seeds = (f"seed {record['demo']['seed']}" for record in records.values())
    header = ["return, 60 episodes (95 % interval)", *seeds]
    return f"{table(header, rows)}\n\nRecords: {named(*records)}, from `vgf-fast demo --seed N`."


def beside_the_release(folder: Path) -> str:
    """Returns of the demo trained here and by the public release, a mean over episodes for each seed."""
    records = load_all(folder, "release_seed*.json")
    if not records:
        return NOT_YET
    runs = list(records.values())

    def of_both(cell: Callable[[Outcome], str]) -> list[str]:
        return [", ".join(cell(run["methods"][name]) for run in runs) for name in PAIR]

    rows = [
        [_setting(result["label"]), *of_both(lambda method, n=n: f"{method['results'][n]['return_mean']:.1f}")]  # type: ignore[misc]
        for n, result in enumerate(runs[0]["methods"]["ours"]["results"])
    ]
    first = of_both(lambda method: f"{method['first_update_seconds']:.1f}")
    others = of_both(lambda method: f"{method['other_updates_seconds']:.0f}")
    rows += [["seconds of the first update, which compiles", *first], ["seconds of all others", *others]]
    ratios = ", ".join(f"{run['ratio']:.2f}" for run in runs)
    seeds = ", ".join(str(run["demo"]["seed"]) for run in runs)
    return (
        f"Beside the public JAX release: the same transitions, {runs[0]['demo']['updates']:,} updates each by turns, "
        f"the same episodes; seeds {seeds}.\n\n"
        f"{table(['return, mean of 60 episodes', 'vgf_fast', 'public JAX release'], rows)}\n\n"
        f"Time of an update here by the release's, median over turns: {ratios}. Threads: {runs[0]['threads']}. "
        f"Records: {named(*records)}, from `python -m profiling.reacher`."
    )


def _setting(label: str) -> str:
    return {"bc": "behaviour cloning", "L=0": "L = 0, best of N"}.get(label, label.replace("=", " = "))
