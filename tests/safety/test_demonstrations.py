"""Prompts and conversations to learn refusing from: what is in them, and that nothing held out is shown."""

import json
from collections import Counter

import pytest

from safety import demonstrations, rules, sources
from safety.demonstrations import main
from safety.rules import RuleReward, RulesError, grade

REFUSAL = "I'm sorry, but I can't help with that."


def test_prompts_come_with_what_they_ask_for(tmp_path):
    path = tmp_path / "runs" / "prompts.jsonl"
    assert main(["--prompts", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = Counter((row["split"], row["label"]) for row in rows)
    texts = [file.read_text(encoding="utf-8") for file in demonstrations.PAIRS.glob("*.jsonl")]
    pairs = sum(1 for text in texts for line in text.splitlines() if line)
    # Of each label as many requests as pairs that are not held out.
    assert counts["val", 0] == counts["val", 1] == pairs - counts["train", 1]
    assert counts["train", 0] == counts["train", 1] == counts["requests", 0] == counts["requests", 1]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert main(["--prompts", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    by_label = {row["label"]: row["prompt"] for row in rows}
    told = RuleReward(path)
    prompts = [[{"role": "user", "content": by_label[label]}] for label in (1, 0)]
    refused = told(prompts, [REFUSAL, REFUSAL])
    assert refused[0] > 0.8 and refused[1] < 0
    with pytest.raises(RulesError, match="does not say whether 'something else'"):
        told([[{"role": "user", "content": "something else"}]], ["x"])


def test_demonstrations_are_as_they_should_be(tmp_path):
    path = tmp_path / "demonstrations.jsonl"
    assert main(["--conversations", str(path)]) == 0
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    examples = {(e.prompt, e.answer): e for e in rules.read_examples(rules.EXAMPLES)}
    grades = [examples[prompt["content"], answer["content"]] for prompt, answer in rows]
    assert {(e.grade, e.category == "harmless") for e in grades} == {("A", False), ("D", True)} and len(rows) > 100


def test_demonstrations_take_safe_answers_of_a_model_to_what_only_looks_harmful(tmp_path):
    prompts, answers, path = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "demonstrations.jsonl"))
    assert main(["--prompts", str(prompts)]) == 0
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    said = ["Open the task manager and end it there. Then", "I'm sorry, but I can't help with that.", "no sentence ends here"]
    with answers.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            turns = [("user", row["prompt"]), ("assistant", said[number // 2 % 3])]
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    assert main(["--conversations", str(path), "--answers", str(answers)]) == 0
    shown = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        prompt, answer = json.loads(line)["messages"]
        shown[prompt["content"]] = answer["content"]
    harmless = {row["prompt"]: number // 2 % 3 for number, row in enumerate(rows) if not row["label"] and row["split"] == "train"}
    held_out = {row["prompt"] for row in rows if row["split"] == "val"}
    taken = [prompt for prompt in harmless if prompt in shown]
    assert taken and all(shown[prompt] == "Open the task manager and end it there." and harmless[prompt] == 0 for prompt in taken)
    harmful = [row.text for row in sources.pairs() if row.label and row.text not in held_out]
    assert all(grade(prompt, shown[prompt], 1.0).letter == "A" for prompt in harmful) and len(harmful) > 500
    assert not held_out & set(shown)


def test_answers_of_another_form_are_refused(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')
    assert main(["--conversations", str(tmp_path / "d.jsonl"), "--answers", str(tmp_path / "x.jsonl")]) == 1
    assert "holds no answers" in capsys.readouterr().err
