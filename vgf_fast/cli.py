"""The command line: vgf-fast demo | generate | train | finetune | evaluate | reproduce | presets | align | info.

Exit codes: 0 done, 1 a mistake, 2 wrong usage, 130 interrupted. Whatever goes wrong is told in one line;
``VGF_FAST_DEBUG=1`` shows its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import pkgutil
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vgf_fast import functional, native
from vgf_fast.common import interrupts, locks, openmp
from vgf_fast.common.devices import choose_device
from vgf_fast.common.files import write_text
from vgf_fast.config import Precision
from vgf_fast.envs.simulators import EvaluationError, Workers
from vgf_fast.experiments.demo import DemoConfig
from vgf_fast.experiments.run import InterruptedRunError
from vgf_fast.experiments.settings import RunConfig, Sections
from vgf_fast.functional import Backend
from vgf_fast.online import Style

if TYPE_CHECKING:
    from vgf_fast.console import Console

AlignMethod = Literal["flow", "plain", "best-of-n", "token-search"]
# What the library says of its arguments, files and environments; anything else is a bug, here or below.
MISTAKES = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, EvaluationError)
PACKAGES = (
    "vgf_fast", "torch", "triton", "numpy", "safetensors", "gymnasium", "mujoco", "ogbench", "h5py", "minari",
    "transformers", "tyro", "rich", "tensorboard", "matplotlib",
)  # fmt: skip


class UsageError(Exception):
    """The arguments are not those of a command."""


@dataclasses.dataclass
class Demo:
    """Train a two-joint arm to reach from noisy data, on the CPU in minutes: pictures, results and a policy."""

    demo: DemoConfig = dataclasses.field(default_factory=DemoConfig)
    out: Path = Path("demo")  # directory of the pictures, results.json and policy/
    device: str | None = None  # cpu, cuda, ...; default: the CPU, which suits networks this small
    backend: Backend = "auto"  # auto, triton or torch


@dataclasses.dataclass
class Generate:
    """Generate an OGBench data set in the simulator, with nothing to download."""

    env: str  # data set, such as cube-single-play or pointmaze-medium-navigate
    out: Path  # directory of the two files
    episodes: int | None = None  # training episodes; or give transitions
    transitions: int | None = None  # training transitions, rounded up to whole episodes
    validation_episodes: int | None = None  # default: a tenth of the training episodes
    seed: int = 0  # of all episodes
    processes: int = 2  # how many simulate at once
    overwrite: bool = False  # replace files that exist


@dataclasses.dataclass
class Train:
    """Train a policy on a task's data. Flags override --set, which overrides --config, which overrides --preset."""

    out: Path  # directory of the run
    preset: str | None = None  # settings of the paper, such as ogbench/cube-double-play
    config: Path | None = None  # YAML file with the sections policy, train and run
    set: tuple[str, ...] = ()  # any settings: policy.particles=5 policy.train_budget.steps=3 train.discount=0.995
    resume: bool = False  # go on from the directory's checkpoint, or start if it has none
    overwrite: bool = False  # remove the run that is in the directory
    seed: int | None = None  # of weights, training and evaluation (0)
    precision: Precision | None = None  # of the matrix products (float32)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


@dataclasses.dataclass
class Evaluate:
    """Evaluate a saved policy for several numbers of flow steps, on the same episodes."""

    policy: Path  # directory of a saved policy, or of a run
    task: str | None = None  # as in training; default: the run's
    env: str | None = None  # a Gymnasium environment instead, such as Reacher-v5
    flow_steps: tuple[int, ...] = (0, 1, 2, 3)  # numbers of flow steps (L_test)
    behavior_cloning: bool = False  # the behaviour model alone, too
    episodes: int = 50  # for each number of flow steps
    num_envs: int = 10  # environments side by side
    workers: Workers = "sync"  # simulate in this process (sync) or in one process a core (async)
    seed: int = 0  # of the episodes
    confidence: float = 0.95  # of the intervals
    max_episode_steps: int = 10_000  # an episode without an end is cut off there
    json: Path | None = None  # file to write the results to
    device: str | None = None  # cpu, cuda, ...; default: the GPU if there is one
    backend: Backend = "auto"  # auto, triton or torch


@dataclasses.dataclass
class Finetune:
    """Go on with a trained run in the simulator: offline to online. The same command goes on after a stop."""

    run: Path  # directory of a run, as vgf-fast train leaves it; it is only read
    out: Path  # directory of online.jsonl, checkpoint/ and policy/
    steps: int = 1_000_000  # in the simulator, those before a stop included
    style: Style = "one_buffer"  # offline data: in one buffer with the new, half_and_half of a batch, or online_only
    warm_up: int = 5000  # steps before the first update
    buffer_size: int = 2_000_000  # most transitions kept
    eval_interval: int = 100_000  # steps between evaluations; there is one at the start too; 0: none
    eval_episodes: int = 50  # for each number of flow steps
    eval_flow_steps: tuple[int, ...] = (0, 1, 2, 3)  # numbers of flow steps (L_test) to evaluate
    log_interval: int = 1000  # steps between records
    checkpoint_interval: int = 50_000  # steps between checkpoints; there is one at the end too
    dataset_dir: str | None = None  # folder of the task's files; default: the run's
    seed: int = 0  # of episodes and acting
    device: str | None = None  # cpu, cuda, ...; default: the GPU if there is one
    backend: Backend = "auto"  # auto, triton or torch


@dataclasses.dataclass
class Reproduce:
    """Train and evaluate a preset with several seeds, as the paper does; the same command goes on after a stop."""

    out: Path  # directory of a run for each seed, evaluations.csv, summary.json and curve.png
    preset: str | None = None  # settings of the paper, such as ogbench/cube-double-play/task2
    config: Path | None = None  # YAML file with the sections policy, train and run, over the preset
    set: tuple[str, ...] = ()  # any settings, over both: run.steps=100000 policy.particles=5
    seeds: str = "0..7"  # such as 0..7 or 0,3,5
    dataset_dir: str | None = None  # folder of the task's files
    device: str | None = None  # cpu, cuda, ...; default: the GPU if there is one


@dataclasses.dataclass
class Presets:
    """List the presets: the paper's settings by name, and its scores."""

    name: str | None = None  # show one with all its settings
    json: bool = False  # as JSON


@dataclasses.dataclass
class Align:
    """Better responses of a language model by a reward model; the same command goes on after a stop."""

    reference: str  # causal language model: a directory, or a name on Hugging Face's hub
    reward: str  # sequence classifier with the same tokenizer, one output, likewise
    prompts: Path  # .txt with a prompt a line, or rows with "prompt": .jsonl, .json, .parquet
    out: Path  # .jsonl, a line a prompt
    method: AlignMethod = "flow"  # embedding flow, the paper's plain form of it, best-of-n, or token-search
    particles: int = 8  # responses a prompt
    steps: int = 20  # of the flow (L); 0 is best-of-N
    step_size: float = 1.0  # in median lengths of a token embedding
    temperature: float = 0.1  # alpha
    reward_units: int | None = None  # most reward passes a prompt: forward 1, forward and backward 2
    trust_radius: float | None = None  # how far a token may get, in the same lengths
    fluency: float = 1.5  # a response's perplexity may be this many times its start's; 0: no bound
    svgd: bool = False  # SVGD between the responses to a prompt
    max_new_tokens: int = 32  # of a first response
    label: int | None = None  # output of the reward model that is the reward, if it has several
    precision: Precision = "float32"  # of both models' weights; particles stay float32
    max_tokens: int = 16384  # padded tokens a pass
    seed: int = 0  # prompt i is sampled with seed + i
    device: str | None = None  # cpu, cuda, ...; default: the GPU if there is one


@dataclasses.dataclass
class Info:
    """Versions, devices, backends and kernels."""

    json: bool = False  # as JSON


# --- commands -----------------------------------------------------------------------------------------------------


def _demo(options: Demo, console: Console) -> None:
    from vgf_fast.console import name_of
    from vgf_fast.experiments import demo

    device = choose_device(options.device or "cpu")
    found = demo.run(options.demo, options.out, device, options.backend, console.line)
    baseline = ("the data's own controller", found.data_mean, found.data_low, found.data_high)
    console.results(f"{demo.ENVIRONMENT}, seed {options.demo.seed}", found.results, demo.CONFIDENCE, baseline)
    for line in demo.verdict(found.results, name_of):
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


def _train_settings(options: Train) -> Sections:
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
    found = reproduce.reproduce(options.out, sections, seeds, paper, console)
    title = f"{options.preset or sections['run']['task']}: {len(found.seeds)} seeds, {found.steps:,} updates"
    console.table(title, *reproduce.table(found))
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
        found = {name: dataclasses.asdict(preset(name)) | {"ours": sorted(preset(name).ours)} for name in names}
        console.line(json.dumps(found, indent=2))
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
    found = information()
    if options.json:
        console.line(json.dumps(found, indent=2))
        return
    rows = [("platform", found["platform"])]
    rows += [(name, version or "not installed") for name, version in found["versions"].items()]
    rows += [(device["name"], device["description"]) for device in found["devices"]]
    rows += [(f"backend {name}", state) for name, state in found["backends"].items()]
    rows += [("kernels", ", ".join(found["kernels"]) or "none")]
    rows += [("compiled C for the CPU", found["compiled"])]
    rows += [("threads", f"{found['threads']['torch']} of torch on {found['threads']['cores']} cores")]
    rows += [("waiting threads", found["threads"]["spin"])]
    console.table("vgf_fast", ("what", "found"), rows, "left")


# --- entry --------------------------------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> tuple[Any, Sections]:
    """The command, and for training the settings it stands on. Raises ``UsageError``, and ``SystemExit`` for --help."""
    if sum(argument.split("=")[0] == "--set" for argument in arguments) > 1:
        raise ValueError(
            "--set is given twice, of which only the last would count: put all assignments after one --set"
        )
    commands: Any = Demo | Generate | Train | Finetune | Evaluate | Reproduce | Presets | Align | Info
    command = _ask(commands, arguments, prog="vgf-fast", description=__doc__)
    if not isinstance(command, Train):
        return command, {}
    # Once more, with the settings as defaults, so that of the flags only those that were given override them.
    sections = _train_settings(command)
    default = Train(command.out, run=RunConfig.from_dict(sections["run"]))
    rest = arguments[arguments.index("train") + 1 :]
    command = _ask(Train, rest, prog="vgf-fast train", default=default)
    return dataclasses.replace(command, run=command.run.checked()), sections


def _ask(kind: Any, arguments: list[str], **options: Any) -> Any:
    """``tyro.cli`` with its complaint as a ``UsageError`` of one line."""
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, config=config, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_line_of(said.getvalue())) from None


def _line_of(box: str) -> str:
    """The complaint in a box of tyro's, the option it takes for meant, and where help is."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    text = " ".join(" ".join(line.strip("│╭╮╰╯|+ ") for line in plain.splitlines()).split())
    parts = [part.strip() for part in re.split("─+|-{4,}", text) if part.strip()]
    meant = re.search(r"Perhaps you meant:? (--[\w-]+)", text)
    # The title, the complaint, perhaps details, and where help is.
    complaint = parts[1] if len(parts) > 1 else text
    program = re.search(r"(vgf-fast[\w -]*?) --help$", parts[-1]) if parts else None
    suggestion = f" (did you mean {meant[1]}?)" if meant else ""
    return f"{complaint.rstrip('.')}{suggestion}; see {program[1] if program else 'vgf-fast'} --help"


def _flattened(arguments: Sequence[str]) -> list[str]:
    """Arguments with tuples as Python writes them, (0, 1), taken apart into the values that a flag takes: 0 1."""
    found = []
    for argument in arguments:
        match = re.fullmatch(r"(?:(--[\w-]+)=)?[(\[]\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*,?\s*[)\]]", argument)
        found += [argument] if match is None else [*filter(None, [match[1]]), *re.split(r"\s*,\s*", match[2])]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _flattened(sys.argv[1:] if arguments is None else arguments)
    absent = [name for name in ("tyro", "rich", "yaml") if importlib.util.find_spec(name) is None]
    if absent:
        return _complain(f"the command line needs {' and '.join(absent)}: pip install 'vgf_fast[train]'")
    with interrupts.listening():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        command, sections = _parse(arguments)
        from vgf_fast.console import Console

        console = Console()
        if isinstance(command, Train):
            with locks.holding(command.out):
                _train(command, sections, console)
        elif isinstance(command, Demo):
            with locks.holding(command.out):
                _demo(command, console)
        else:
            functions: dict[type, Any] = {
                Generate: _generate,
                Evaluate: _evaluate,
                Finetune: _finetune,
                Reproduce: _reproduce,
                Presets: _presets,
                Align: _align,
                Info: _info,
            }
            functions[type(command)](command, console)
    except SystemExit as stop:
        return _complain(stop.code) if isinstance(stop.code, str) else int(stop.code or 0)
    except UsageError as error:
        return _complain(str(error), 2)
    except InterruptedRunError as error:
        sys.stderr.write(f"{error}\n")
        return interrupts.INTERRUPTED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return interrupts.INTERRUPTED
    except Exception as error:
        # A library may make of an interrupt that a package is not installed, and the like; it cannot make these.
        if interrupts.requested() and not isinstance(error, (OSError, ArithmeticError)):
            sys.stderr.write("interrupted\n")
            return interrupts.INTERRUPTED
        if os.environ.get("VGF_FAST_DEBUG") == "1":
            raise
        if isinstance(error, MISTAKES):
            return _complain(str(error) or type(error).__name__)
        return _complain(f"{type(error).__name__}: {error} (not foreseen: VGF_FAST_DEBUG=1 shows where)")
    return 0


def _complain(message: str, code: int = 1) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
