"""Preference data in the layouts of their hubs, chat templates, and win rates."""

import gzip
import json

import pytest

pytest.importorskip("transformers")
import language

from vgf_fast.llm import RewardModel
from vgf_fast.llm.data import load_hh, load_tldr, parse_dialogue, read_rows, render_chat, reward_judge, win_rate

POST = "SUBREDDIT: r/cats\n\nTITLE: A cat\n\nPOST: It sleeps.\n\nTL;DR:"
TLDR = {
    "completion": ({"prompt": POST, "completion": " Sleeps."}, (POST, " Sleeps.", None)),
    "preference": ({"prompt": POST, "chosen": " a", "rejected": " b"}, (POST, " a", " b")),
    "comparison": (
        {"info": {"subreddit": "cats", "title": "A cat", "post": "It sleeps."},
         "summaries": [{"text": " b"}, {"text": " a"}], "choice": 1},
        (POST, " a", " b"),
    ),
}  # fmt: skip


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    else:
        path.write_text(text + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("layout", TLDR)
def test_layouts_of_tldr(tmp_path, suffix, layout):
    row, expected = TLDR[layout]
    for source in (write(tmp_path / f"rows{suffix}", [row, row]), [row, row]):
        first, second = load_tldr(source)
        assert (first.prompt, first.chosen, first.rejected) == expected
        assert first == second
        assert first.messages == ({"role": "user", "content": POST},)


HH = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Human: what?\n\nAssistant:"


def test_layout_of_hh(tmp_path):
    rows = [
        {"chosen": HH + " good", "rejected": HH + " bad"},
        {"chosen": HH + " good", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
    ]
    one, other = load_hh(write(tmp_path / "hh.jsonl.gz", rows))
    assert (one.prompt, one.chosen, one.rejected) == (HH, "good", "bad")
    assert [message["role"] for message in one.messages] == ["user", "assistant", "user"]
    assert one.messages[2]["content"] == "Human: what?"
    # The rejected dialogue answers another prompt.
    assert (other.prompt, other.rejected) == (HH, None)


@pytest.mark.parametrize(
    ("load", "rows", "message"),
    [
        (
            load_tldr,
            [TLDR["completion"][0], {"text": "?"}],
            "row 1: fields text; expected prompt, or info and summaries",
        ),
        (load_tldr, [{**TLDR["comparison"][0], "choice": 2}], "row 0: 2 summaries and choice 2, expected 2 and 0 or 1"),
        (load_hh, [{"chosen": "x"}], "row 0: fields chosen; expected chosen and rejected"),
        (load_hh, [{"chosen": "\n\nHuman: a", "rejected": "b"}], "row 0: the dialogue ends with the human"),
    ],
)
def test_other_layouts_are_named(tmp_path, load, rows, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=f"list, {message}"):
        load(rows)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no JSON"):
        list(read_rows(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: list, expected an object"):
        list(read_rows(path))
    with pytest.raises(ValueError, match=r"ends in '.csv', expected .jsonl"):
        list(read_rows(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"dialogue begins with 'Hello', expected"):
        parse_dialogue("Hello")


def test_chat_templates():
    tokenizer = language.wordpiece()
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        render_chat(tokenizer, [{"role": "user", "content": "a"}])
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    copied = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    assert render_chat(copied, [{"role": "user", "content": "the cat"}]) == "<user>the cat<a>"


def longer(prompt, first, second):
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def test_win_rate():
    found = win_rate(longer, ["p"] * 4, ["aaa", "aa", "a", "aa"], ["a", "a", "aa", "bb"])
    assert (found.rate, found.wins, found.ties, found.losses, found.agreement) == (0.625, 2, 1, 1, 1.0)
    assert 0.0 <= found.low < found.rate < found.high <= 1.0
    assert found == win_rate(longer, ["p"] * 4, ["aaa", "aa", "a", "aa"], ["a", "a", "aa", "bb"])
    every = win_rate(longer, ["p"] * 9, ["aa"] * 9, ["a"] * 9)
    assert (every.rate, every.low, every.high) == (1.0, 1.0, 1.0)


def test_a_judge_of_places_sees_only_ties():
    found = win_rate(lambda prompt, first, second: 1.0, ["p"] * 5, ["a"] * 5, ["b"] * 5)
    assert (found.rate, found.ties, found.agreement) == (0.5, 5, 0.0)


def test_a_reward_model_judges():
    tokenizer = language.wordpiece()
    reward = RewardModel(language.classifier("bert", tokenizer), tokenizer)
    prompts, ours, theirs = ["the cat", "a dog"], ["sleeps in the sun", "runs"], ["runs", "sleeps"]
    encode = reward.vocabulary.encode
    values = [
        [float(reward.evaluate([encode(p)], [encode(r)])[0]) for p, r in zip(prompts, side, strict=True)]
        for side in (ours, theirs)
    ]
    found = win_rate(reward_judge(reward), prompts, ours, theirs)
    assert found.wins == sum(a > b for a, b in zip(*values, strict=True))
    assert found.agreement == 1.0
    assert win_rate(reward_judge(reward, tie_within=1e9), prompts, ours, theirs).ties == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((longer, [], [], []), "have 0, 0 and 0 entries"),
        ((longer, ["p"], ["a", "b"], ["c"]), "have 1, 2 and 1 entries"),
        ((lambda *texts: 0.7, ["p"], ["a"], ["b"]), "judge returned 0.7, expected 1, 0.5 or 0"),
    ],
)
def test_what_is_no_comparison(arguments, message):
    with pytest.raises(ValueError, match=message):
        win_rate(*arguments)
    with pytest.raises(ValueError, match="confidence is 1"):
        win_rate(longer, ["p"], ["a"], ["b"], confidence=1)
