"""Write the tables and charts of README.md and docs/ from the records: ``python -m profiling.report``.

What stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced; nothing else is touched. No record, no number.
The charts in ``docs/`` are drawn anew when the numbers they show have changed.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from profiling import charts, records, scaling
from profiling.charts import Bars, Curve
from profiling.records import Record

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "profiling" / "results"
DOCS = REPOSITORY / "docs"
NOT_YET = "Not yet measured on a GPU."
NAMES = {
    "ours-float32": "vgf_fast, float32",
    "ours-bfloat16": "vgf_fast, bfloat16 matrix products",
    "torch-float32": "vgf_fast on its PyTorch backend, float32",
    "torch-bfloat16": "vgf_fast on its PyTorch backend, bfloat16",
    "eager-float32": "plain PyTorch with autograd, float32",
    "compile-float32": "torch.compile, max-autotune, float32",
    "compile-bfloat16": "torch.compile, max-autotune, bfloat16",
    "jax-release": "public JAX release, jit, float32",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def latest(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The newest records of a file: benchmark -> method -> record."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            same = found.setdefault(record["benchmark"], {})
            if record["method"] not in same or record["date"] >= same[record["method"]]["date"]:
                same[record["method"]] = record
    return found


def newest(path: Path) -> list[Record]:
    """The records of a file without those that a later one of the same measurement replaces; none without a file."""
    found = sorted(records.read(path), key=lambda record: record.date) if path.is_file() else []
    return list({(r.benchmark, r.op, r.method, r.grid, json.dumps(r.sizes)): r for r in found}.values())


def _ratio(record: dict[str, Any] | None, peer: str) -> str:
    return "" if record is None or record["p50"] is None else _cell(record[f"ratio_to_{peer}"])


def _source(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> str:
    records = [record for methods in found.values() for record in methods.values()]
    dates = sorted({record["date"][:10] for record in records})
    devices = sorted({record["device"] for record in records})
    name = path.relative_to(REPOSITORY)
    return f"Record: `{name}` ({', '.join(dates)}, {', '.join(devices)})."


def times(path: Path) -> str:
    """Time of an update and of an action, as multiples of a peer's, and peak memory.

    The peer is the JAX release, or eager PyTorch where the release was not there.
    """
    found = latest(path)
    if not found:
        return NOT_YET
    update, act, memory = found.get("update", {}), found.get("act", {}), found.get("memory update", {})
    peer = "jax" if "jax-release" in {**update, **act} else "eager"
    rows = []
    for method, name in NAMES.items():
        if method in update or method in act:
            peak = (memory.get(method) or update.get(method) or act[method])["peak_bytes"]
            rows.append([name, _ratio(update.get(method), peer), _ratio(act.get(method), peer), f"{peak / 2**20:.0f}"])
    header = ["", "one update", "one action, one state", "peak memory, MiB"]
    threads = sorted({record["threads"] for methods in (update, act) for record in methods.values()})
    words = f"{_in_words(update, act, peer)}Threads: {', '.join(map(str, threads))}."
    return f"{table(header, rows)}\n\n{words} {_source(found, path)}"


def _in_words(update: dict[str, dict[str, Any]], act: dict[str, dict[str, Any]], peer: str) -> str:
    """What the comparison says of this library; empty where it was not measured."""
    whose = {"jax": "the release's", "eager": "plain PyTorch's"}[peer]
    found = []
    for what, methods in (("An update", update), ("One action", act)):
        ratios = []
        for dtype in ("float32", "bfloat16"):
            if text := _ratio(methods.get(f"ours-{dtype}"), peer):
                ratios.append(f"{text} in {dtype}")
        if ratios:
            found.append(f"{what} takes, of {whose} time, {' and '.join(ratios)}. ")
    return "".join(found)


def launches() -> str:
    """Launches of an update and of an action, and of an update in eager PyTorch."""
    found = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))
    rows = [[name, str(entry["triton"]), str(entry["torch"]), str(entry["total"])] for name, entry in found.items()]
    header = ["launches at the paper's sizes", "Triton", "PyTorch", "together"]
    return table(header, rows) + "\n\nRecord: `profiling/results/launches.json`, from `python -m profiling.launches`."


def resources() -> str:
    """Registers, spills and shared memory of the kernels of an update and an action in bfloat16."""
    found = json.loads((RESULTS / "resources.json").read_text(encoding="utf-8"))
    targets = list(dict.fromkeys(row["target"] for row in found["rows"]))
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in found["rows"]:
        if row["paper_size"] and "bf16" in row["scenario"] and row["has_product"]:
            kernels.setdefault(row["kernel"], {}).setdefault(row["target"], []).append(row)
    rows = []
    for kernel, of_target in kernels.items():
        cells = [f"`{kernel}`"]
        for target in targets:
            variants = of_target.get(target, [])
            registers, spilled, shared = (
                max((variant[key] for variant in variants), default=0)
                for key in ("registers", "spilled_bytes", "shared_bytes")
            )
            cells.append(f"{registers} / {spilled} / {shared / 1024:.0f}")
        rows.append(cells)
    header = ["registers / bytes spilled / KiB shared", *targets]
    source = (
        f"Record: `profiling/results/resources.json` (Triton {found['triton']}), from `python -m profiling.resources`."
    )
    return (
        table(header, rows)
        + "\n\nThe largest of each kernel's variants at the paper's sizes in bfloat16, as the compiler gives them; "
        + f"no measurement of a run. {source}"
    )


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _named(path: Path, found: Sequence[Record], command: str) -> str:
    dates = ", ".join(sorted({record.date[:10] for record in found}))
    devices = ", ".join(sorted({record.device for record in found}))
    return f"Record: `{path.relative_to(REPOSITORY)}` ({dates}, {devices}), from `python -m profiling.{command}`."


def operations(path: Path) -> str:
    """Time of every operation as a multiple of eager PyTorch's and of torch.compile's, at two sizes."""
    found = [record for record in newest(path) if record.p50 is not None and record.benchmark.startswith("op ")]
    if not found:
        return NOT_YET
    ours = "triton" if any(record.method.startswith("triton") for record in found) else "torch"
    shown = {(r.op, r.grid, r.dtype): r for r in found if r.method == f"{ours}-{r.dtype}"}
    columns = [(g, d) for g in ("paper", "one state") for d in ("float32", "bfloat16")]
    columns = [column for column in columns if any(key[1:] == column for key in shown)]
    rows = []
    for op in dict.fromkeys(key[0] for key in shown):
        cells = [shown.get((op, *column)) for column in columns]
        both = [(_cell(r.ratio_to_eager), _cell(r.ratio_to_compile)) if r else ("", "") for r in cells]
        rows.append([f"`{op}`", *(" / ".join(filter(None, pair)) for pair in both)])
    header = ["x eager / x torch.compile", *(f"{grid}, {dtype}" for grid, dtype in columns)]
    return table(header, rows) + "\n\n" + _named(path, found, "bench ops")


def exponents(path: Path) -> str:
    """How the cost grows with each size."""
    found = newest(path)
    if not found:
        return NOT_YET
    rows = []
    for curve in scaling.curves(found):
        fitted = scaling.fit(curve.x, curve.seconds)
        values = f"{curve.x[0]} to {curve.x[-1]}"
        exponent = _cell(None if fitted is None else fitted.exponent)
        rows.append([f"`{curve.op}`", curve.factor, values, exponent])
    header = ["", "varied", "from, to", "exponent p of a + b x^p"]
    return table(header, rows) + "\n\n" + _named(path, found, "bench scaling")


def roofline(path: Path) -> str:
    """What the machine can do, and how much of it each operation gets."""
    if not path.is_file():
        return NOT_YET
    found = json.loads(path.read_text(encoding="utf-8"))
    ceilings = found["ceilings"]
    rates = "; ".join(f"{dtype} {rate * 1e-12:.3g} TFLOP/s" for dtype, rate in ceilings["matrix"].items())
    rows = [
        [
            f"`{op['op']}`",
            op["grid"],
            op["dtype"],
            _cell(op["flops"] * 1e-9),
            op["bound"],
            _cell(100.0 * op["fraction"], 0),
        ]
        for op in found["ops"]
    ]
    source = f"Record: `{path.relative_to(REPOSITORY)}` ({found['date'][:10]}, {found['device']})"
    measured = f"Measured ceilings: products and sums {rates}; copy {ceilings['memory'] * 1e-9:.3g} GB/s; "
    launch = f"an operator or launch {ceilings['launch'] * 1e6:.2g} us."
    header = ["", "sizes", "dtype", "GFLOP", "bound by", "% of what is possible"]
    return f"{table(header, rows)}\n\n{measured}{launch} {source}, from `python -m profiling.roofline`."


def nearest(path: Path) -> str:
    """Time and memory of the nearest-token search beside plain PyTorch."""
    found = newest(path)
    if not found:
        return "Not yet measured."
    by_sizes: dict[str, dict[str, Record]] = {}
    for record in found:
        by_sizes.setdefault(json.dumps(record.sizes), {})[record.method] = record
    rows = []
    for same in by_sizes.values():
        sizes = same["ours"].sizes
        cells = [f"{sizes['rows']} x {sizes['vocabulary']} x {sizes['width']}, k = {sizes['k']}"]
        for method in ("ours", "cdist", "matmul"):
            taken = (same[method].peak_bytes - same[method].built_bytes) / 2**20
            cells.append(f"{_cell(same[method].ratio_to_eager)} / {taken:.0f}")
        rows.append(cells)
    header = ["time, multiples of cdist's / MiB taken", "`nearest_token`", "`torch.cdist`, argmin", "product, argmax"]
    load = max(record.load_average or 0.0 for record in found)
    threads = ", ".join(sorted({str(record.threads) for record in found}))
    facts = f"{threads} threads, load average {load:.0f} before the run. For k > 1 topk takes the place of argmin."
    return f"{table(header, rows)}\n\n{_named(path, found, 'bench llm')} {facts} {NOT_YET}"


def _score(found: dict[str, Any]) -> str:
    return f"{found['mean']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


def _gain(found: dict[str, Any]) -> str:
    sign = "+" if found["mean"] >= 0 else ""
    return sign + _score(found)


def learned(folder: Path) -> str:
    """The flow against best-of-N, behaviour cloning and the data, a task a column, and where it does not win."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [record for record in records if "methods" in record]
    if not found:
        return "Not yet measured."
    rows: list[list[str]] = []
    for name, make in (
        ("the data's own trajectories", lambda one: _score(one["data"])),
        ("behaviour cloning", lambda one: _score(one["methods"]["bc"])),
        ("L = 0, best of N", lambda one: _score(one["methods"]["L=0"])),
        ("VGF, L of the training", lambda one: f"L = {one['fixed']}: {_score(one['methods'][_label(one['fixed'])])}"),
        (
            "VGF, best L by these numbers",
            lambda one: f"L = {one['best']}: {_score(one['methods'][_label(one['best'])])}",
        ),
        ("L of the training over L = 0, seed by seed", lambda one: _gain(one["gain"])),
    ):
        rows.append([name, *(make(one) for one in found)])
    verdicts = (
        ("The L of the training beats best of N in", lambda gain: gain["low"] > 0),
        ("The L of the training loses to best of N in", lambda gain: gain["high"] < 0),
        ("The interval of its gain includes 0 in", lambda gain: gain["low"] <= 0 <= gain["high"]),
    )
    named = [(text, [one["task"] for one in found if holds(one["gain"])]) for text, holds in verdicts]
    parts = [f"{text} {_listed(names)}." for text, names in named if names]
    rows.append(
        ["seeds, episodes each", *(f"{len(o['seeds'])}, {o['settings']['run']['eval_episodes']}" for o in found)]
    )
    about = "95 % intervals over seeds, those of the data over its trajectories."
    files = ", ".join(f"`{(folder / one['task']).relative_to(REPOSITORY)}.json`" for one in found)
    tuning = "; ".join(f"{one['task']}: {one['tuning']}" for one in found)
    about += f" Settings were chosen on these tasks ({tuning})."
    made = ", ".join(f"`{one['data_command']}`" for one in found)
    source = f"Records: {files}, from `python -m profiling.learning TASK --data DIR`, on data of {made}."
    header = ["", *(f"{one['task']}, {one['metric']}" for one in found)]
    return f"{table(header, rows)}\n\n{' '.join(parts)} {about} {source}"


def _label(steps: int) -> str:
    return f"L={steps}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def online(folder: Path) -> str:
    """Scores against steps in the simulator, for the runs that were taken online."""
    parts = []
    for path in sorted(folder.glob("*-online.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        labels = list(next(iter(record["scores"].values())))
        header = [f"{record['task']}, steps in the simulator", *(f"{label}, {record['metric']}" for label in labels)]
        rows = [
            [f"{int(step):,}", *(_score(by_label[label]) for label in labels)]
            for step, by_label in record["scores"].items()
        ]
        about = f"{len(record['seeds'])} seeds, 95 % intervals over seeds."
        parts.append(
            f"{table(header, rows)}\n\n{about} Record: `{path.relative_to(REPOSITORY)}`, from `{record['command']}`."
        )
    return "\n\n".join(parts) or "Not yet measured."


def demonstration(folder: Path) -> str:
    """Returns of the demo, a column for each seed."""
    paths = sorted(folder.glob("reacher_seed*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = [["the data's own controller", *(_return(record["data"]) for record in found)]]
    for results in zip(*(record["results"] for record in found), strict=True):
        rows.append([_setting(results[0]["label"]), *(_return(result) for result in results)])
    header = ["return, 60 episodes (95 % interval)", *(f"seed {record['demo']['seed']}" for record in found)]
    files = ", ".join(f"`{path.relative_to(REPOSITORY)}`" for path in paths)
    return f"{table(header, rows)}\n\nRecords: {files}, from `vgf-fast demo --seed N`."


def beside_the_release(folder: Path) -> str:
    """Returns of the demo trained here and by the public release, a mean over episodes for each seed."""
    paths = sorted(folder.glob("release_seed*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found:
        return "Not yet measured."
    rows = []
    for results in zip(*(one["methods"][name]["results"] for one in found for name in PAIR), strict=True):
        means = [result["return_mean"] for result in results]
        by_method = [means[index :: len(PAIR)] for index in range(len(PAIR))]
        cells = [", ".join(f"{mean:.1f}" for mean in own) for own in by_method]
        rows.append([_setting(results[0]["label"]), *cells])
    seconds = [[f"{one['methods'][name]['other_updates_seconds']:.0f}" for one in found] for name in PAIR]
    compiling = [[f"{one['methods'][name]['first_update_seconds']:.1f}" for one in found] for name in PAIR]
    rows.append(["seconds of the first update, which compiles", *map(", ".join, compiling)])
    rows.append(["seconds of all others", *map(", ".join, seconds)])
    ratios = ", ".join(f"{one['ratio']:.2f}" for one in found)
    seeds = ", ".join(str(one["demo"]["seed"]) for one in found)
    about = (
        f"Beside the public JAX release: the same transitions, {found[0]['demo']['updates']:,} updates each by turns, "
        f"the same episodes; seeds {seeds}."
    )
    files = ", ".join(f"`{path.relative_to(REPOSITORY)}`" for path in paths)
    source = f"Time of an update here by the release's, median over turns: {ratios}. Threads: {found[0]['threads']}."
    header = ["return, mean of 60 episodes", "vgf_fast", "public JAX release"]
    records = f"{source} Records: {files}, from `python -m profiling.reacher`."
    return "\n\n".join([about, table(header, rows), records])


PAIR = ("ours", "release")


def _return(found: dict[str, Any]) -> str:
    return f"{found['return_mean']:.1f} ({found['return_low']:.1f} to {found['return_high']:.1f})"


def _setting(label: str) -> str:
    return {"bc": "behaviour cloning", "L=0": "L = 0, best of N"}.get(label, label.replace("=", " = "))


def _quoted(pair: dict[str, Any], name: str) -> str:
    found = pair["methods"][name]
    text = f"{pair['prompt']} {found['text']}".replace("|", "\\|")
    reward = "no response keeps the cap" if found["reward"] is None else f"{found['reward']:.2f}"
    return f"{text} ({reward}; judge {found['judge_ratio']:.1f})"


def alignment(path: Path, overhead: Path, longer: Path) -> str:
    """Methods on MiniLM's pairs, texts of the best, the middle and the worst pair, and what the flow adds in time."""
    if not path.is_file():
        return "Not yet measured."
    found = json.loads(path.read_text(encoding="utf-8"))
    pairs, summary = found["pairs"], found["summary"]
    flow = summary["flow"]
    rows = []
    for name, row in summary.items():
        distinct = f"{row['distinct_2']:.2f}"
        cells = [
            *(f"{row[key]:.3f}" for key in ("reward", "reward_mean_of_8", "reward_any")),
            f"{row['within_bound']}",
            f"{row['perplexity_ratio']:.2f} / {row['judge_ratio']:.2f}",
            f"{row['judge_within_1.5']}",
            distinct,
            f"{100 * row['changed']:.0f}" if name.startswith(("flow", "plain", "token")) else "",
            f"{row['flow_wins']}" if "flow_wins" in row else "",
            f"{row['units']:.0f}" + "".join(f" / {row[key] / flow[key]:.2f}" for key in ("operations", "seconds")),
        ]
        rows.append([name, *cells])
    header = [
        "medians",
        "reward within the cap",
        "mean of the 8 best",
        "any fluency",
        "keeps the cap",
        "perplexity / judge's",
        "judge within 1.5",
        "distinct-2",
        "% tokens changed",
        "flow wins",
        "units / operations / time",
    ]
    ranked = sorted(pairs, key=lambda pair: pair["methods"]["flow"]["reward"] or -1.0)
    worst_prose = max(pairs, key=lambda pair: pair["methods"]["flow"]["judge_ratio"])
    chosen = {
        "highest reward": ranked[-1],
        "middle": ranked[len(ranked) // 2],
        "lowest": ranked[0],
        "judge likes it least": worst_prose,
    }
    shown = ("flow", "token search", "best of N")
    texts = [[which, pair["target"], *(_quoted(pair, name) for name in shown)] for which, pair in chosen.items()]
    held_out = found["held_out_perplexity"]
    one = found["example"]
    parts = [
        f'It makes of "{one["prompt"]} {one["start_text"]}" (reward {one["start_reward"]:.2f}, perplexity '
        f'{one["start_perplexity"]:.0f}) "{one["prompt"]} {one["text"]}" ({one["reward"]:.2f}, '
        f"{one['perplexity']:.0f}).",
        table(header, rows),
        f"{len(pairs)} pairs, counts are of them; {found['units']} units of the reward model a pair, "
        f"{found['particles']} responses in flow and search; `equal operations`: as many as the flow spends in all "
        "models, or the same run where that is more. Operations and time are multiples of the flow's, perplexities of "
        "the median of a pair's first responses. Held-out perplexity of the reference model "
        f"{held_out['reference']:.0f}, of the judge {held_out['judge']:.0f}.",
        table(["flow's pair", "target", *(f"{name} (reward; judge's ratio)" for name in shown)], texts),
        f"Record: `{path.relative_to(REPOSITORY)}` ({found['date'][:10]}, {found['device']}), "
        f"from `{found['command']}`.",
    ]
    if longer.is_file():
        more = json.loads(longer.read_text(encoding="utf-8"))
        rewards = ", ".join(f"{name} {row['reward']:.3f}" for name, row in more["summary"].items())
        wins = " and ".join(f"{row['flow_wins']} ({name})" for name, row in more["summary"].items() if name != "flow")
        parts.append(
            f"With {more['units']} units the rewards within the cap are: {rewards}. The flow wins {wins} of "
            f"{len(more['pairs'])} pairs, the judge is within 1.5 in {more['summary']['flow']['judge_within_1.5']}. "
            f"Record: `{longer.relative_to(REPOSITORY)}`, from `{more['command']}`."
        )
    if overhead.is_file():
        cost = json.loads(overhead.read_text(encoding="utf-8"))
        parts.append(
            "Beside the models' passes, an align step spends on flow, projection and bookkeeping "
            f"{100 * cost['base']['added']:.0f} % more with models of the sizes of GPT-2 and BERT base, "
            f"{100 * cost['small']['added']:.0f} % with the small ones here. Record: "
            f"`{overhead.relative_to(REPOSITORY)}` ({cost['date'][:10]}, {cost['device']}, one thread), from "
            f"`{cost['command']}`."
        )
    return "\n\n".join(parts)


# --- charts ----------------------------------------------------------------------------------------------------------


def update_bars() -> list[Bars]:
    """Time of an update by method, a panel a record: the JAX release is 1, or eager PyTorch where it was not there."""
    panels = []
    for name in ("cpu", "gpu"):
        found = latest(RESULTS / f"{name}.jsonl").get("update", {})
        against = "jax" if "jax-release" in found else "eager"
        values = {
            label: 1.0 if method == "jax-release" else found[method][f"ratio_to_{against}"]
            for method, label in NAMES.items()
            if method in found and found[method]["p50"] is not None
        }
        if values:
            peer = NAMES["jax-release" if against == "jax" else "eager-float32"]
            device = next(iter(found.values()))["device"]
            panels.append(Bars(f"One training update, {device}", f"time, multiples of: {peer}", values))
    return panels


def cost_curves(path: Path) -> list[Curve]:
    """Cost against states, as rows, in multiples of that of one state."""
    found = []
    for curve in scaling.curves(newest(path)):
        if curve.factor == "states":
            rows = [record.sizes["batch"] * record.sizes["particles"] for record in curve.records]
            cost = [seconds / curve.seconds[0] for seconds in curve.seconds]
            found.append(Curve(curve.op.replace("_", " "), rows, cost))
    return found


def draw(check: bool) -> bool:
    """Draw the charts whose numbers changed, or with ``check`` none; whether all showed their numbers already."""
    wanted: list[tuple[Path, Any, Callable[[Path], None]]] = []
    if panels := update_bars():
        wanted.append((DOCS / "update_time.png", panels, lambda path: charts.time_by_method(path, panels)))
    if curves := cost_curves(RESULTS / "scaling-cpu.jsonl"):
        title, unit = "Cost against rows, CPU", "time, multiples of that of one state"
        draw_curves = functools.partial(charts.cost_against_rows, curves=curves, title=title, unit=unit)
        wanted.append((DOCS / "cost_against_rows.png", [curves, title, unit], draw_curves))
    stale = [(path, make) for path, numbers, make in wanted if charts.stored_digest(path) != charts.digest(numbers)]
    if not check:
        for path, make in stale:
            make(path)
    return not stale


SPEED: dict[str, Callable[[], str]] = {"cpu": lambda: times(RESULTS / "cpu.jsonl")}
# Page, from the repository's root -> its sections, by the name between their markers.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": lambda: demonstration(RESULTS / "demo"), **SPEED},
    "docs/reproduce.md": {
        "learning": lambda: learned(RESULTS / "learning"),
        "online": lambda: online(RESULTS / "learning"),
        "release": lambda: beside_the_release(RESULTS / "demo"),
    },
    "docs/language-models.md": {
        "alignment": lambda: alignment(
            *(RESULTS / f"{name}.json" for name in ("alignment", "alignment-overhead", "alignment-320"))
        ),
    },
    "docs/kernels.md": {"launches": launches, "resources": resources},
    "docs/performance.md": {
        **SPEED,
        "gpu": lambda: times(RESULTS / "gpu.jsonl"),
        "ops": lambda: operations(RESULTS / "ops-cpu.jsonl"),
        "ops-gpu": lambda: operations(RESULTS / "gpu.jsonl"),
        "llm": lambda: nearest(RESULTS / "llm-cpu.jsonl"),
        "scaling": lambda: exponents(RESULTS / "scaling-cpu.jsonl"),
        "roofline": lambda: roofline(RESULTS / "roofline-cpu.json"),
        "roofline-gpu": lambda: roofline(RESULTS / "roofline-cuda.json"),
    },
}


def rendered(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """The text with every section written anew.

    Raises ``ValueError`` for a section whose markers it lacks.
    """
    for name, make in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the text has no one place for {name!r}: expected {begin} and {end}, once each")
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        section = f"{begin}\n{make()}\n{end}"
        text = re.sub(pattern, lambda match, section=section: section, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages and the charts, or with ``--check`` say whether they are what the records give."""
    parser = argparse.ArgumentParser(prog="python -m profiling.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if a page or a chart is out of date"
    )
    options = parser.parse_args(arguments)
    fresh = draw(options.check)
    for page, sections in PAGES.items():
        path = REPOSITORY / page
        before = path.read_text(encoding="utf-8")
        after = rendered(before, sections)
        fresh &= after == before
        if after != before and not options.check:
            path.write_text(after, encoding="utf-8")
    return int(options.check and not fresh)


if __name__ == "__main__":
    sys.exit(main())
