"""Every code block of the README and of the site runs: page by page, in order, in one folder and one namespace a page.

A comment before a block says what the tests change in it, such as ``<!-- in the tests: `steps=1000` is `steps=2` -->``,
or why they do not run it: ``<!-- not run: it downloads -->``. Then only its syntax is checked, and the options of
``vgf-fast``. A block of another language than Python and sh holds no code.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import NamedTuple

import language
import pytest
import torch
from release import DATA

from vgf_fast import cli

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>(?:in the tests|not run): [^\n]*?) -->\n(?P=indent))?"
    r"```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NO_CODE = {"text", "bibtex"}


class Block(NamedTuple):
    """A code block of a page."""

    line: int
    note: str  # what the comment before it says, if there is one
    language: str
    code: str

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run: ")

    def in_the_tests(self) -> str:
        """The code with the changes of its comment, each of which must be found."""
        code = self.code
        for change in filter(None, self.note.removeprefix("in the tests: ").split("; ")):
            before, after = re.fullmatch(r"`([^`]+)` is `([^`]+)`", change).groups()
            assert before in code, f"line {self.line}: {before!r} is not in the block"
            code = code.replace(before, after)
        return code


def blocks_of(text: str) -> list[Block]:
    """The blocks of a Markdown text."""
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(line, match["note"] or "", match["language"], textwrap.dedent(match["code"])))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block without its comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(block: Block, page: str, namespace: dict) -> None:
    """Run a block, or check one that is not run."""
    where = f"{page}:{block.line}"
    if block.language in NO_CODE:
        return
    assert block.language in ("python", "sh"), f"{where} is a block of {block.language!r}"
    code = block.in_the_tests() if block.runs else block.code
    if block.language == "python":
        # A table's entry, as it stands between braces, is part of an expression.
        if not block.runs and re.match(r'"\w+":', code):
            code = f"{{{code}}}"
        ast.parse(code, where)
        if block.runs:
            exec(compile("\n" * (block.line - 1) + code, page, "exec"), namespace)
        return
    subprocess.run(["sh", "-n"], input=code, text=True, check=True)
    for command in commands(code):
        if command[0] == "vgf-fast":
            if block.runs:
                assert cli.main(command[1:]) == 0, f"{where}: {shlex.join(command)}"
            else:
                cli._parse(command[1:])
        else:
            assert not block.runs, f"{where} is run, but {command[0]!r} is no command of the tests"


def run_all(text: str, page: str) -> dict:
    """Run the blocks of a page, in order; what they defined."""
    namespace = {"__name__": "__page__"}
    with torch.random.fork_rng():
        for block in blocks_of(text):
            run(block, page, namespace)
    return namespace


def checkpoint_of_the_release(folder: Path) -> None:
    for name, copy in (("params_3.pkl", "params_3.pkl"), ("config.json", "flags.json")):
        shutil.copy(DATA / "reference_checkpoint" / name, folder / copy)


def language_models(folder: Path) -> None:
    """Two random models of one tokenizer, a reference for MiniLM's, and two prompts."""
    from transformers import AutoTokenizer

    from profiling.language import minilm_directory

    tokenizer = language.wordpiece()
    models = {"reference": language.causal("gpt2", tokenizer), "reward": language.classifier("bert", tokenizer)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    language.causal("gpt2", AutoTokenizer.from_pretrained(minilm_directory())).save_pretrained(folder / "small-gpt2")
    (folder / "prompts.txt").write_text("the old man\na young dog\n")


WRITTEN = {"profiling/results/nsight/"}  # by a command, and not committed
# What a page takes for granted.
GIVEN = {"docs/reproduce.md": checkpoint_of_the_release, "docs/language-models.md": language_models}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, tmp_path, monkeypatch, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = blocks_of(text)
    assert len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)) / 2, "a block's comment has another form"
    monkeypatch.chdir(tmp_path)
    GIVEN.get(page, lambda folder: None)(tmp_path)
    run_all(text, page)


PAGE = """
<!-- in the tests: `4` is `2` -->
```python
found = 4
```
<!-- not run: it downloads -->
```sh
vgf-fast train --task d4rl/hopper-medium-v2 --out run --steps 5
```
1. In a list:

    ```python
    more = found
    ```
"""


def test_blocks_are_found_changed_and_run_in_one_namespace():
    blocks = blocks_of(PAGE)
    assert [(block.line, block.language, block.runs) for block in blocks] == [
        (4, "python", True), (8, "sh", False), (13, "python", True),
    ]  # fmt: skip
    assert run_all(PAGE, "page")["more"] == 2


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("`4`", "`5`", "'5' is not in the block"),
        ("more = found", "more = missing", "name 'missing' is not defined"),
        ("```sh\n", "```shell\n", "a block of 'shell'"),
        ("--steps 5", "--stepps 5", "stepps"),
        ("<!-- not run: it downloads -->\n", "", "No such file|cannot|Error|== 0"),
        ("vgf-fast train", "vgf-fast 'train", "returned non-zero"),
    ],
)
def test_a_block_that_is_wrong_fails(before, after, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "a file"))
    (tmp_path / "a file").touch()
    with pytest.raises(Exception, match=error):
        run_all(PAGE.replace(before, after), "page")


def test_the_readme_is_short_and_trains_before_its_first_table():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 100 <= len(lines) <= 130
    table = next(number for number, line in enumerate(lines) if line.startswith("|"))
    assert any("vgf-fast demo" in line for line in lines[:table])
    assert any(".fit(" in line for line in lines[:table])


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "profiling/README.md"])
def test_what_a_page_names_is_there(page):
    """Files of the repository; and what is linked to, which of the site's pages `make docs` checks too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:vgf_fast|kernels|tests|profiling|examples|docs)/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [name for name in named if not (ROOT / name).exists() and name not in WRITTEN]
    missing += [name for name in linked if not (ROOT / page).parent.joinpath(name).exists()]
    assert not missing
