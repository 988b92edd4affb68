"""The alignment benchmark's bookkeeping: who wins a pair, what counts without a response in the cap, and the table."""

import json

import pytest

pytest.importorskip("transformers")

from profiling import alignment, tables
from profiling.tables import language


def method(reward, judge=1.0, feasible=True, **changes):
    row = {
        "reward": reward if feasible else None, "feasible": feasible, "reward_any": reward,
        "reward_mean_of_8": reward - 0.1 if feasible else None, "reward_mean": reward - 0.2, "perplexity_ratio": 1.2,
        "judge_ratio": judge, "distinct_2": 0.5, "distinct_texts": 7, "changed": 0.6, "continuous_reward": None,
        "mmd_squared": None, "mmd_bound": None, "text": f"text of {reward}", "units": 320, "reference_tokens": 10,
        "operations": 2e9, "seconds": 3.0, "responses": 8,
    }  # fmt: skip
    return {**row, **changes}


EXAMPLE = {
    "prompt": "we saw", "target": "a dog", "text": "a dog", "start_text": "a cat", "reward": 0.9, "start_reward": 0.25,
    "perplexity": 40.4, "start_perplexity": 90.0,
}  # fmt: skip


def records():
    rows = [
        (method(0.8), method(0.6, judge=2.0, operations=1e9), method(0.9, feasible=False)),
        (method(0.5, judge=1.6), method(0.7), method(0.4)),
        (method(0.3, feasible=False), method(0.2), method(0.1, feasible=False)),
    ]
    names = ("flow", "best of N", "plain")
    return [
        {"prompt": f"prompt {i}", "target": f"target {i}", "methods": dict(zip(names, row, strict=True))}
        for i, row in enumerate(rows)
    ]


def test_a_method_without_a_response_in_the_cap_loses_and_counts_as_the_least_cosine():
    summary = alignment.summarise(records())
    # Against best of N: won, lost, lost for want of a response; against plain: won by the cap, won, neither has one.
    assert (summary["best of N"]["flow_wins"], summary["plain"]["flow_wins"]) == (1, 2)
    assert summary["flow"]["reward"] == 0.5
    assert summary["plain"]["reward"] == -1.0
    assert summary["plain"]["reward_any"] == 0.4
    assert [summary[name]["within_bound"] for name in summary] == [2, 3, 1]
    assert [summary[name]["judge_within_1.5"] for name in summary] == [2, 2, 3]
    assert "continuous_reward" not in summary["flow"]


def test_parts_share_the_work_and_a_run_goes_on(tmp_path, monkeypatch):
    """Two parts fill one file, a line that was cut is done again, and the record has the pairs in their order."""

    class Models:
        def __init__(self, directory):
            pass

        def pairs(self, count, seed):
            return [{"prompt": f"prompt {i}", "target": f"target {i}"} for i in range(count)]

    ran = []

    def run_pair(models, pair, seed, names, units):
        ran.append(seed)
        return {**records()[seed % 1000], "seed": seed}

    monkeypatch.setattr(alignment, "Models", Models)
    monkeypatch.setattr(alignment, "run_pair", run_pair)
    monkeypatch.setattr(alignment, "example", lambda models: EXAMPLE)
    for name in ("reference", "judge"):
        (tmp_path / f"{name}.json").write_text('{"held_out_perplexity": 99.0}')
    work, out = tmp_path / "work.jsonl", tmp_path / "out.json"
    common = ["alignment", "--models", str(tmp_path), "--work", str(work), "--pairs", "3", "--seed", "4"]
    monkeypatch.setattr("sys.argv", [*common, "--part", "1", "2"])
    alignment.main()
    with work.open("a") as file:
        file.write('{"prompt": "prompt 0", "tar\n')
    monkeypatch.setattr("sys.argv", [*common, "--out", str(out)])
    alignment.main()
    assert ran == [4001, 4000, 4002]
    found = json.loads(out.read_text())
    assert [pair["prompt"] for pair in found["pairs"]] == ["prompt 0", "prompt 1", "prompt 2"]
    assert str(tmp_path) not in out.read_text()
    assert found["summary"]["flow"]["reward"] == 0.5
    alignment.main()
    assert len(ran) == 3


def test_the_table_says_what_the_record_says(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    paths = path, overhead, longer = [tmp_path / f"{name}.json" for name in ("alignment", "overhead", "longer")]
    assert language.alignment(*paths) == "Not yet measured."
    facts = {"date": "2026-01-02T03:04:05+00:00", "device": "a CPU", "command": "python -m this"}
    record = {
        **facts, "example": EXAMPLE, "units": 320, "particles": 8,
        "held_out_perplexity": {"reference": 190.4, "judge": 224.0},
        "summary": alignment.summarise(records()), "pairs": records(),
    }  # fmt: skip
    for pair in record["pairs"]:
        pair["methods"]["token search"] = pair["methods"]["best of N"]
    path.write_text(json.dumps(record))
    text = language.alignment(*paths)
    assert "| flow | 0.500 | 0.400 | 0.500 | 2 | 1.20 / 1.00 | 2 | 0.50 | 60 |  | 320 / 1.00 / 1.00 |" in text
    assert "| plain | -1.000 |" in text
    assert 'of "we saw a cat" (reward 0.25, perplexity 90) "we saw a dog" (0.90, 40).' in text
    assert "reference model 190, of the judge 224" in text
    assert "| highest reward | target 0 | prompt 0 text of 0.8 (0.80; judge 1.0) |" in text
    assert "| lowest | target 2 | prompt 2 text of 0.3 (no response keeps the cap; judge 1.0) |" in text
    assert "| judge likes it least | target 1 |" in text
    assert "an align step" not in text
    overhead.write_text(json.dumps({**facts, "small": {"added": 0.4}, "base": {"added": 0.051}}))
    assert "5 % more with models of the sizes of GPT-2 and BERT base, 40 % with" in language.alignment(*paths)
    assert "With" not in language.alignment(*paths)
    longer.write_text(json.dumps({**record, "units": 640}))
    text = language.alignment(*paths)
    assert "With 640 units the rewards within the cap are: flow 0.500, best of N 0.600, plain -1.000." in text
    assert "wins 1 (best of N) and 2 (plain) of 3 pairs, the judge is within 1.5 in 2." in text
