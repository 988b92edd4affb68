"""The commands and their options, as the command line asks for them; a comment beside an option is its help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from vgf_fast.config import Precision
from vgf_fast.envs.simulators import Workers
from vgf_fast.experiments.demo import DemoConfig
from vgf_fast.experiments.settings import RunConfig
from vgf_fast.functional import Backend
from vgf_fast.online import Style

AlignMethod = Literal["flow", "plain", "best-of-n", "token-search"]


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
