"""vgf-fast align: models in Hugging Face's format, a line a prompt, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")
import language

from vgf_fast import cli
from vgf_fast.llm import ReferenceModel, RewardModel

PROMPTS = ["the old man", "a cat", "the dog sees", "rain and sun", "a big house", "the boat"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A tiny reference and reward model and prompts, on disk."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = language.wordpiece()
    for name, model in (
        ("reference", language.causal("gpt2", tokenizer)),
        ("reward", language.classifier("bert", tokenizer, seed=3)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def command(paths, out, *more):
    return [
        "align", "--reference", str(paths / "reference"), "--reward", str(paths / "reward"), "--prompts",
        str(paths / "prompts.txt"), "--out", str(out), "--particles", "3", "--steps", "2", "--max-new-tokens", "5",
        "--device", "cpu", *more,
    ]  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(found):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert cli.main(command(paths, out)) == 0
    return rows(out)


def test_a_line_a_prompt_with_everything(paths, whole):
    assert [row["prompt"] for row in whole] == PROMPTS
    assert [row["index"] for row in whole] == list(range(len(PROMPTS)))
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths / "reward")
    reward = RewardModel(AutoModelForSequenceClassification.from_pretrained(paths / "reward"), tokenizer)
    reference = ReferenceModel(AutoModelForCausalLM.from_pretrained(paths / "reference"), tokenizer)
    encode = reward.vocabulary.encode
    for row in whole:
        assert len(row["responses"]) == 3
        context = encode(row["prompt"])
        for response in row["responses"]:
            # What is reported of a text is what the models say of that text.
            ids = encode(response["text"])
            assert response["reward"] == pytest.approx(float(reward.evaluate([context], [ids])[0]), abs=1e-5)
            likely = float(reference.score([context], [ids])[0])
            assert response["log_probability"] == pytest.approx(likely, abs=1e-3)
            assert response["tokens"] == len(ids)
            assert response["distance"] >= 0.0
        assert row["reward"] == max(r["reward"] for r in row["responses"] if r["text"] == row["text"])
        assert row["transport"]["mmd_squared"] <= row["transport"]["bound"] + 1e-6
        assert row["usage"]["reward_forward"] > 0


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_it_goes_on_with_nothing_lost_or_doubled(paths, whole, tmp_path, sent):
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vgf_fast.cli", *command(paths, out)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out.is_file() and out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(sent)
    process.communicate(timeout=60)
    with out.open("a") as file:
        file.write('{"index": 5, "cut of')
    assert cli.main(command(paths, out)) == 0
    assert without_time(rows(out)) == without_time(whole)
    before = out.read_bytes()
    assert cli.main(command(paths, out)) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize("method", ["plain", "best-of-n", "token-search"])
def test_other_methods(paths, tmp_path, method):
    out = tmp_path / "out.jsonl"
    assert cli.main(command(paths, out, "--method", method, "--steps", "1")) == 0
    assert len(rows(out)) == len(PROMPTS)


def test_rows_of_json_are_prompts_too(paths, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat", "id": 7}\n')
    out = tmp_path / "out.jsonl"
    arguments = command(paths, out)
    arguments[arguments.index("--prompts") + 1] = str(prompts)
    assert cli.main(arguments) == 0
    assert [row["prompt"] for row in rows(out)] == ["the cat"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--particles", "0"], "particles is 0, expected an integer >= 1"),
        (["--fluency", "-1"], "fluency is -1"),
        (["--steps", "-1"], "steps is -1, expected an integer >= 0"),
        (["--reference", "nowhere/at-all"], "--reference is 'nowhere/at-all', which cannot be loaded"),
        (["--prompts", "nowhere.txt"], "no file of prompts at nowhere.txt"),
        (["--label", "4"], "label is 4, expected 0 to 0"),
    ],
)
def test_mistakes_are_told_in_a_line(paths, tmp_path, capsys, more, message):
    out = tmp_path / "out.jsonl"
    arguments = command(paths, out)
    for flag, value in zip(more[::2], more[1::2], strict=True):
        if flag in arguments:
            at = arguments.index(flag)
            del arguments[at : at + 2]
        arguments += [flag, value]
    assert cli.main(arguments) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_other_settings_and_prompts_are_refused(paths, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert cli.main(command(paths, out)) == 0
    before = out.read_bytes()
    assert cli.main(command(paths, out, "--seed", "1")) == 1
    assert "was written with other settings" in capsys.readouterr().err
    other = tmp_path / "prompts.txt"
    other.write_text("a boat\n")
    arguments = command(paths, out)
    arguments[arguments.index("--prompts") + 1] = str(other)
    assert cli.main(arguments) == 1
    assert "which the prompts given do not" in capsys.readouterr().err
    assert out.read_bytes() == before
    out.write_text("not ours\n")
    assert cli.main(command(paths, out)) == 1
    assert "line 1: not written by an alignment" in capsys.readouterr().err


def test_what_is_written_stays_when_a_prompt_cannot_be_aligned(paths, whole, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("\n".join([*PROMPTS[:2], "the " * 60, *PROMPTS[3:]]) + "\n")
    arguments = command(paths, out)
    arguments[arguments.index("--prompts") + 1] = str(prompts)
    assert cli.main(arguments) == 1
    assert "at most 48: shorten" in " ".join(capsys.readouterr().err.split())
    assert without_time(rows(out)) == without_time(whole[:2])
    # With the prompt put right it goes on there.
    assert cli.main(command(paths, out)) == 0
    assert without_time(rows(out)) == without_time(whole)
