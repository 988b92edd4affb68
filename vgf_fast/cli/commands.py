"""What every command does."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vgf_fast import functional
from vgf_fast.backends import native
from vgf_fast.cli.options import Align, Demo, Evaluate, Finetune, Generate, Info, Presets, Reproduce, Train
from vgf_fast.common import locks, openmp
from vgf_fast.common.devices import choose_device
from vgf_fast.common.files import write_text
from vgf_fast.experiments.settings import RunConfig, Sections

if TYPE_CHECKING:
    from vgf_fast.cli.console import Console

PACKAGES = (
    "vgf_fast", "torch", "triton", "numpy", "safetensors", "gymnasium", "mujoco", "ogbench", "h5py", "minari",
    "transformers", "tyro", "rich", "tensorboard", "matplotlib",
)  # fmt: skip


def _demo(options: Demo, console: Console) -> None:
    from vgf_fast.cli.console import name_of
    from vgf_fast.experiments import demo

    device = choose_device(options.device or "cpu")
    outcome = demo.run(options.demo, options.out, device, options.backend, console.line)
    baseline = ("the data's own controller", outcome.data_mean, outcome.data_low, outcome.data_high)
    console.results(f"{demo.ENVIRONMENT}, seed {options.demo.seed}", outcome.results, demo.CONFIDENCE, baseline)
    for line in demo.verdict(outcome.results, name_of):
        console.line(line)
    console.line(f"written to {options.out}: learning_curve.png, particles.png, results.json, policy/")


def _generate(options: Generate, console: Console) -> None:
    from vgf_fast.envs.generate import GenerationError, generate

    try:
        files = generate(
            options.env,
            options.out,
            episodes=options.episodes,
            transitions=options.transitions,
            validation_episodes=options.validation_episodes,
            seed=options.seed,
            processes=options.processes,
            overwrite=options.overwrite,
        )
    except GenerationError as error:
        raise ValueError(str(error)) from error
    for path in files:
        console.line(f"written: {path}")


def _train(options: Train, sections: Sections, console: Console) -> None:
    from vgf_fast.envs import tasks
    from vgf_fast.experiments import run as runs

    run, out = options.run, options.out
    if runs.holds_run(out) and not options.resume:
        if not options.overwrite:
            raise FileExistsError(f"{out} holds a run: go on with --resume, or remove it with --overwrite")
        runs.clear(out)
    if not run.task:
        raise ValueError("there is no task: give --task, or a preset or configuration with run.task")
    if run.dataset_dir is not None:
        run = dataclasses.replace(run, dataset_dir=str(Path(run.dataset_dir).expanduser().resolve()))
    if tasks.is_file(run.task):
        run = dataclasses.replace(run, task=str(Path(run.task).expanduser().resolve()))
    device, dtype = choose_device(run.device), getattr(torch, run.data_precision)
    task = tasks.load(
        run.task, run.dataset_dir, env=run.env, url=run.data_url, action_low=run.action_low,
        action_high=run.action_high, device=device, dtype=dtype,
    )  # fmt: skip
    for line in task.summary.splitlines():
        console.line(line)
    if task.evaluation.make_env is None and run.eval_interval:
        raise ValueError(
            f"{run.task} has no environment to evaluate in: give --env, or train without by --eval-interval 0"
        )
    learner = runs.open_learner(out, sections, task.train, run)
    policy = learner.policy
    backend = functional.resolve_backend(
        policy.backend, policy.device, policy.config.particles, policy.config.action_dim, policy.particle_dtype
    )
    weights = sum(parameter.numel() for parameter in policy.parameters())
    start = f"going on after {learner.step:,} of" if learner.step else "training for"
    console.line(f"{start} {run.steps:,} updates: {weights:,} weights on {policy.device}, backend {backend}")
    runs.train(out, run, learner, task.train, task.evaluation, console)
    env = " --env ENV" if task.evaluation.make_env is None else ""
    console.line(f"done; evaluate with: vgf-fast evaluate --policy {shlex.quote(str(out))}{env}")


def train_settings(options: Train) -> Sections:
    """Everything but the flags of the run: the directory's own settings first, where it is gone on with."""
    from vgf_fast.experiments import run as runs
    from vgf_fast.experiments.settings import layered, read_file

    saved = options.out / runs.SETTINGS_FILE
    base: Sections = read_file(saved) if options.resume and saved.is_file() else {}
    sections = layered(options.preset, options.config, options.set, base)
    for name in ("seed", "precision"):
        if getattr(options, name) is not None:
            sections["train"][name] = getattr(options, name)
    return sections


def _evaluate(options: Evaluate, console: Console) -> None:
    from vgf_fast.envs import tasks
    from vgf_fast.envs.evaluation import evaluate
    from vgf_fast.experiments.run import POLICY, SETTINGS_FILE
    from vgf_fast.experiments.settings import read_file
    from vgf_fast.policy import MODEL_FILE, VGFPolicy

    if options.task is not None and options.env is not None:
        raise ValueError(f"--task is {options.task} and --env is {options.env}, expected only one of them")
    folder, task = options.policy, options.task
    if not (folder / MODEL_FILE).is_file() and (folder / POLICY / MODEL_FILE).is_file():
        folder = folder / POLICY
    dataset_dir, env = None, options.env
    if task is None and options.env is None and (options.policy / SETTINGS_FILE).is_file():
        saved = RunConfig.from_dict(read_file(options.policy / SETTINGS_FILE).get("run", {}))
        task, dataset_dir, env = saved.task, saved.dataset_dir, saved.env
    policy = VGFPolicy.from_pretrained(folder, device=choose_device(options.device), backend=options.backend)
    if not task and env is None:
        raise ValueError("there is no task: give --task, or --env for a Gymnasium environment")
    name = env or task
    make_env, score = tasks.environment(task or "", dataset_dir, env=env)
    if make_env is None:
        raise ValueError(f"{task} has no environment to evaluate in: give --env")
    results = evaluate(
        policy,
        make_env,
        episodes=options.episodes,
        flow_steps=options.flow_steps,
        seed=options.seed,
        num_envs=options.num_envs,
        behavior_cloning=options.behavior_cloning,
        workers=options.workers,
        score=score,
        confidence=options.confidence,
        max_episode_steps=options.max_episode_steps,
    )
    console.results(f"{name}, {options.episodes} episodes", results, options.confidence)
    if options.json is not None:
        record = {
            "policy": str(folder),
            "environment": name,
            "seed": options.seed,
            "confidence": options.confidence,
            "results": [result.to_dict() for result in results],
        }
        write_text(options.json, json.dumps(record, indent=2) + "\n")
        console.line(f"written: {options.json}")


def _finetune(options: Finetune, console: Console) -> None:
    from vgf_fast.experiments.finetune import finetune

    finetune(console=console, **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})
    console.line(f"done; evaluate with: vgf-fast evaluate --policy {shlex.quote(str(options.out))}")


def _reproduce(options: Reproduce, console: Console) -> None:
    from vgf_fast.experiments import reproduce
    from vgf_fast.experiments.presets import preset
    from vgf_fast.experiments.settings import layered

    sections = layered(options.preset, options.config, options.set, {})
    for name in ("dataset_dir", "device"):
        if getattr(options, name) is not None:
            sections["run"][name] = getattr(options, name)
    if not sections["run"].get("task"):
        raise ValueError("there is no task: give --preset, or a configuration with run.task")
    paper = None if options.preset is None else preset(options.preset).paper
    seeds = reproduce.parse_seeds(options.seeds)
    summary = reproduce.reproduce(options.out, sections, seeds, paper, console)
    title = f"{options.preset or sections['run']['task']}: {len(summary.seeds)} seeds, {summary.steps:,} updates"
    console.table(title, *reproduce.table(summary))
    console.line(f"written to {options.out}: {reproduce.EVALUATIONS}, {reproduce.SUMMARY}, {reproduce.CURVE}")


def _align(options: Align, console: Console) -> None:
    try:
        from vgf_fast.llm.run import align_paths
    except ImportError as error:
        raise ImportError(f"aligning needs transformers ({error}): pip install 'vgf_fast[llm]'") from error
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    count = align_paths(**given, report=console.line)
    console.line(f"{count} prompts aligned: {options.out}")


def _presets(options: Presets, console: Console) -> None:
    from vgf_fast.experiments.presets import AMORTIZED, preset, presets, train_presets

    names = list(presets) if options.name is None else [options.name]
    if options.json or options.name is not None:
        shown = {name: dataclasses.asdict(preset(name)) | {"ours": sorted(preset(name).ours)} for name in names}
        console.line(json.dumps(shown, indent=2))
        return
    rows = []
    for name in (name for name in names if AMORTIZED not in name):
        policy, train, one = presets[name], train_presets[name], preset(name)
        budget, paper = policy.train_budget, one.paper
        score = "" if paper is None else f"{paper.vgf:g} ({paper.fql:g} / {paper.iql:g})"
        rows.append(
            [
                name,
                f"{policy.observation_dim} / {policy.action_dim}",
                f"{train.discount:g}",
                policy.target_q_aggregation,
                f"{budget.steps} / {budget.step_size:g} / {budget.temperature:g}",
                f"{one.run.get('steps', 0):,}",
                score if not paper or not paper.about or "/task" not in name else "",
            ]
        )
    header = ["preset", "O / A", "discount", "TD target", "L / eps / alpha", "updates", "paper: VGF (FQL / IQL)"]
    console.table("Presets", header, rows)
    console.line(
        "Scores of OGBench are means of an environment's five tasks. --name shows a preset, and what is ours in it."
    )
    console.line(f"Every one but the demo's has an amortised variant, such as d4rl/hopper-medium-v2{AMORTIZED}.")


def information() -> dict[str, Any]:
    """Versions, devices, backends and kernels, as JSON types."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [{"name": "cpu", "description": platform.processor() or platform.machine()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        devices.append({"name": f"cuda:{index}", "description": f"{properties.name}, {memory}, {capability}"})
    if not functional.triton_installed():
        triton = "not installed: pip install 'vgf_fast[triton]'"
    elif functional.triton_interpreted():
        triton = "available, in Triton's interpreter"
    else:
        triton = "available" if torch.cuda.is_available() else "needs a GPU, or TRITON_INTERPRET=1"
    kernels = importlib.util.find_spec("vgf_fast.kernels")
    places = kernels.submodule_search_locations if kernels is not None else None
    return {
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "backends": {"torch": "available", "triton": triton},
        "kernels": sorted(module.name for module in pkgutil.iter_modules(places)) if places else [],
        "compiled": native.state(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count(), "spin": openmp.SPIN},
    }


def _info(options: Info, console: Console) -> None:
    facts = information()
    if options.json:
        console.line(json.dumps(facts, indent=2))
        return
    rows = [("platform", facts["platform"])]
    rows += [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [(device["name"], device["description"]) for device in facts["devices"]]
    rows += [(f"backend {name}", state) for name, state in facts["backends"].items()]
    rows += [("kernels", ", ".join(facts["kernels"]) or "none")]
    rows += [("compiled C for the CPU", facts["compiled"])]
    rows += [("threads", f"{facts['threads']['torch']} of torch on {facts['threads']['cores']} cores")]
    rows += [("waiting threads", facts["threads"]["spin"])]
    console.table("vgf_fast", ("what", "found"), rows, "left")


COMMANDS: dict[type, Any] = {
    Demo: _demo,
    Generate: _generate,
    Train: _train,
    Finetune: _finetune,
    Evaluate: _evaluate,
    Reproduce: _reproduce,
    Presets: _presets,
    Align: _align,
    Info: _info,
}


def carry_out(command: Any, sections: Sections, console: Console) -> None:
    """Do what a command asks for; ``sections`` are the settings that training stands on. Raises what it runs into."""
    own = locks.holding(command.out) if isinstance(command, (Demo, Train)) else contextlib.nullcontext()
    settings = (sections,) if isinstance(command, Train) else ()
    with own:
        COMMANDS[type(command)](command, *settings, console)
