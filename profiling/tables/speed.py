"""Tables of times: update and action beside their peers, single operations, launches, and what is predicted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling import scaling
from profiling.records import Record
from profiling.tables import NOT_ON_GPU, NOT_YET, by_columns, latest, load, named, newest, number, source, table

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
WORKS = {"update": "one update", "act": "one action"}


def _ratio(record: dict[str, Any] | None, peer: str) -> str:
    return "" if record is None or record["p50"] is None else number(record[f"ratio_to_{peer}"])


def times(path: Path) -> str:
    """Time of an update and of an action, as multiples of a peer's, and peak memory.

    The peer is the JAX release, or eager PyTorch where the release was not there.
    """
    measured = latest(path)
    if not measured:
        return NOT_ON_GPU
    update, act, memory = (measured.get(name, {}) for name in ("update", "act", "memory update"))
    peer = "jax" if "jax-release" in {**update, **act} else "eager"
    rows = []
    for method, name in NAMES.items():
        if method in update or method in act:
            peak = (memory.get(method) or update.get(method) or act[method])["peak_bytes"]
            rows.append([name, _ratio(update.get(method), peer), _ratio(act.get(method), peer), f"{peak / 2**20:.0f}"])
    header = ["", "one update", "one action, one state", "peak memory, MiB"]
    threads = sorted({record["threads"] for methods in (update, act) for record in methods.values()})
    every = [record for methods in measured.values() for record in methods.values()]
    dates, devices = ([record[key] for record in every] for key in ("date", "device"))
    words = f"{_in_words(update, act, peer)}Threads: {', '.join(map(str, threads))}."
    return f"{table(header, rows)}\n\n{words} {source(path, dates, devices)}"


def _in_words(update: dict[str, dict[str, Any]], act: dict[str, dict[str, Any]], peer: str) -> str:
    """What the comparison says of this library; empty where it was not measured."""
    whose = {"jax": "the release's", "eager": "plain PyTorch's"}[peer]
    sentences = []
    for what, methods in (("An update", update), ("One action", act)):
        ratios = []
        for dtype in ("float32", "bfloat16"):
            if text := _ratio(methods.get(f"ours-{dtype}"), peer):
                ratios.append(f"{text} in {dtype}")
        if ratios:
            sentences.append(f"{what} takes, of {whose} time, {' and '.join(ratios)}. ")
    return "".join(sentences)


def launches(path: Path) -> str:
    """Launches of an update and of an action, and of an update in eager PyTorch."""
    columns: dict[str, Callable[[Any], str]] = {
        "launches at the paper's sizes": lambda entry: entry[0],
        "Triton": lambda entry: str(entry[1]["triton"]),
        "PyTorch": lambda entry: str(entry[1]["torch"]),
        "together": lambda entry: str(entry[1]["total"]),
    }
    return f"{by_columns(load(path).items(), columns)}\n\nRecord: {named(path)}, from `python -m profiling.launches`."


def resources(path: Path) -> str:
    """Registers, spills and shared memory of the kernels of an update and an action in bfloat16."""
    record = load(path)
    variants: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in record["rows"]:
        if row["paper_size"] and re.match("(flow|acting|training) bf16", row["scenario"]):
            variants.setdefault(row["kernel"], {}).setdefault(row["target"], []).append(row)

    def largest(rows: list[dict[str, Any]]) -> str:
        keys = ("registers", "spilled_bytes", "shared_bytes")
        registers, spilled, shared = (max((row[key] for row in rows), default=0) for key in keys)
        return f"{registers} / {spilled} / {shared / 1024:.0f}"

    targets = dict.fromkeys(row["target"] for row in record["rows"])
    rows = [
        [f"`{kernel}`", *(largest(of_target.get(target, [])) for target in targets)]
        for kernel, of_target in variants.items()
    ]
    return (
        f"{table(['registers / bytes spilled / KiB shared', *targets], rows)}\n\n"
        "The largest of each kernel's variants at the paper's sizes in bfloat16, as the compiler gives them; no "
        f"measurement of a run. Record: {named(path)} (Triton {record['triton']}), from "
        "`python -m profiling.resources`."
    )


def _taken(record: dict[str, Any], measured: Path) -> dict[str, dict[str, Any]]:
    """What a GPU took for the works that a prediction has."""
    gpu, method = latest(measured), f"ours-{record['precision']}"
    return {
        work: gpu[work][method]
        for work in WORKS
        if method in gpu.get(work, {}) and gpu[work][method]["p50"] is not None
    }


def predicted_times(path: Path, measured: Path) -> str:
    """Times of an update and an action by the model of the machine code, and what a GPU took where that is known."""
    if not path.is_file():
        return "Not yet predicted."
    record = load(path)
    taken = _taken(record, measured)

    def error(work: str) -> str:
        whole = record[work].get("two branches", record[work]["one chain"])
        return f"{100.0 * (whole / (1e6 * taken[work]['p50']) - 1.0):+.0f}" if work in taken else ""

    columns: dict[str, Callable[[str], str]] = {
        "predicted, not measured": lambda work: WORKS[work],
        "launches": lambda work: str(record[work]["launches"]),
        "us in one chain": lambda work: number(record[work]["one chain"], 0),
        "us on two branches": lambda work: number(record[work].get("two branches"), 0),
    }
    if taken:
        columns["us measured"] = lambda work: number(1e6 * taken[work]["p50"], 0) if work in taken else ""
        columns["error of the model, %"] = error
    about = (
        f"Predicted, not measured: an H200, by a model of the machine code for {record['target']} of Triton "
        f"{record['triton']}, at the paper's sizes in {record['precision']}. "
        f"Record: {named(path)}, from `python -m profiling.predict --write`."
    )
    if taken:
        dates, devices = ([one[key] for one in taken.values()] for key in ("date", "device"))
        about += f" {source(measured, dates, devices)}"
    return f"{by_columns(WORKS, columns)}\n\n{about}"


def predicted(path: Path, measured: Path) -> str:
    """``predicted_times``, and the kernels by their share of them."""
    if not path.is_file():
        return "Not yet predicted."
    record, kernels = load(path), []
    for work, title in WORKS.items():
        variants: dict[str, list[dict[str, Any]]] = {}
        for row in record[work]["kernels"]:
            variants.setdefault(row["kernel"], []).append(row)
        spent = {name: sum(row["launches"] * row["microseconds"] for row in rows) for name, rows in variants.items()}
        for name in sorted(spent, key=lambda name: -spent[name]):
            most = (str(max(row[key] for row in variants[name])) for key in ("registers", "spilled_bytes"))
            launched = sum(row["launches"] for row in variants[name])
            kernels.append([f"`{name}`", title, str(launched), number(spent[name], 0), *most])
    header = ["kernel", "in", "launches", "us of all, without gaps", "registers", "bytes spilled"]
    whole, _, about = predicted_times(path, measured).rpartition("\n\n")
    return f"{whole}\n\n{table(header, kernels)}\n\n{about}"


def operations(path: Path) -> str:
    """Time of every operation as a multiple of eager PyTorch's and of torch.compile's, at two sizes."""
    timed = [record for record in newest(path) if record.p50 is not None and record.benchmark.startswith("op ")]
    if not timed:
        return NOT_ON_GPU
    ours = "triton" if any(record.method.startswith("triton") for record in timed) else "torch"
    shown = {(r.op, r.grid, r.dtype): r for r in timed if r.method == f"{ours}-{r.dtype}"}

    def ratios(record: Record | None) -> str:
        both = (record.ratio_to_eager, record.ratio_to_compile) if record else ()
        return " / ".join(filter(None, map(number, both)))

    columns: dict[str, Callable[[Any], str]] = {"x eager / x torch.compile": lambda op: f"`{op}`"}
    for grid in ("paper", "one state"):
        for dtype in ("float32", "bfloat16"):
            if any(key[1:] == (grid, dtype) for key in shown):
                columns[f"{grid}, {dtype}"] = lambda op, size=(grid, dtype): ratios(shown.get((op, *size)))  # type: ignore[misc]
    return f"{by_columns(dict.fromkeys(key[0] for key in shown), columns)}\n\n{_source(path, timed, 'bench ops')}"


def exponents(path: Path) -> str:
    """How the cost grows with each size."""
    timed = newest(path)
    if not timed:
        return NOT_ON_GPU

    def exponent(curve: scaling.Curve) -> str:
        fitted = scaling.fit(curve.x, curve.seconds)
        return number(None if fitted is None else fitted.exponent)

    columns: dict[str, Callable[[Any], str]] = {
        "": lambda curve: f"`{curve.op}`",
        "varied": lambda curve: curve.factor,
        "from, to": lambda curve: f"{curve.x[0]} to {curve.x[-1]}",
        "exponent p of a + b x^p": exponent,
    }
    return f"{by_columns(scaling.curves(timed), columns)}\n\n{_source(path, timed, 'bench scaling')}"


def roofline(path: Path) -> str:
    """What the machine can do, and how much of it each operation gets."""
    if not path.is_file():
        return NOT_ON_GPU
    record = load(path)
    ceilings = record["ceilings"]
    rates = "; ".join(f"{dtype} {rate * 1e-12:.3g} TFLOP/s" for dtype, rate in ceilings["matrix"].items())
    columns: dict[str, Callable[[Any], str]] = {
        "": lambda op: f"`{op['op']}`",
        "sizes": lambda op: op["grid"],
        "dtype": lambda op: op["dtype"],
        "GFLOP": lambda op: number(op["flops"] * 1e-9),
        "bound by": lambda op: op["bound"],
        "% of what is possible": lambda op: number(100.0 * op["fraction"], 0),
    }
    return (
        f"{by_columns(record['ops'], columns)}\n\nMeasured ceilings: products and sums {rates}; copy "
        f"{ceilings['memory'] * 1e-9:.3g} GB/s; an operator or launch {ceilings['launch'] * 1e6:.2g} us. "
        f"{source(path, [record['date']], [record['device']], 'roofline')}"
    )


def nearest(path: Path) -> str:
    """Time and memory of the nearest-token search beside plain PyTorch."""
    timed = newest(path)
    if not timed:
        return NOT_YET
    by_sizes: dict[str, dict[str, Record]] = {}
    for record in timed:
        by_sizes.setdefault(json.dumps(record.sizes), {})[record.method] = record

    def sizes(same: dict[str, Record]) -> str:
        given = same["ours"].sizes
        return f"{given['rows']} x {given['vocabulary']} x {given['width']}, k = {given['k']}"

    def taken(record: Record) -> str:
        return f"{number(record.ratio_to_eager)} / {(record.peak_bytes - record.built_bytes) / 2**20:.0f}"

    columns: dict[str, Callable[[Any], str]] = {
        "time, multiples of cdist's / MiB taken": sizes,
        "`nearest_token`": lambda same: taken(same["ours"]),
        "`torch.cdist`, argmin": lambda same: taken(same["cdist"]),
        "product, argmax": lambda same: taken(same["matmul"]),
    }
    load_average = max(record.load_average or 0.0 for record in timed)
    threads = ", ".join(sorted({str(record.threads) for record in timed}))
    facts = f"{threads} threads, load average {load_average:.0f} before the run."
    about = f"For k > 1 topk takes the place of argmin. {NOT_ON_GPU}"
    return f"{by_columns(by_sizes.values(), columns)}\n\n{_source(path, timed, 'bench llm')} {facts} {about}"


def _source(path: Path, timed: list[Record], command: str) -> str:
    return source(path, (record.date for record in timed), (record.device for record in timed), command)
