"""The lm-evaluation-harness on a CRVQ model: `crvq eval --tasks`, and its own `--model hf`, which imports nothing."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crvq_hf.commands.cli import main
from crvq_hf.evaluation import tasks as harness

QUESTIONS = ["the quick brown", "seven wizards", "over a lazy", "box five dozen", "liquor jugs while"]
CHOICES = [" fox", " dog"]
TASK = """
task: foxes
dataset_path: json
dataset_kwargs:
  data_files: {folder}/questions.jsonl
  cache_dir: {folder}/cache
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
EVALUATE = """
import sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
assert "crvq_hf" not in sys.modules
results = simple_evaluate(
    model="hf",
    model_args={{"pretrained": {model!r}, "device": "cpu"}},
    tasks=["foxes"],
    task_manager=TaskManager(include_path={folder!r}, include_defaults=False),
    log_samples=False,
)
print("accuracy", results["results"]["foxes"]["acc,none"])
print(sys.modules["crvq_hf"].__file__)
"""


def log_probability(model, tokenizer, text: str, more: str) -> float:
    """Returns the log-probability, in nats, of `more` after `text`."""
    start, tokens = len(tokenizer(text)["input_ids"]), tokenizer(text + more)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(scores[place - 1, tokens[place]].item() for place in range(start, len(tokens)))


@pytest.fixture
def task_folder(checkpoint, tmp_path):
    """Folder of a task that the model gets right but for its first question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    rows = []
    for question in QUESTIONS:
        scores = [log_probability(model, tokenizer, question, choice) for choice in CHOICES]
        answer = scores.index(max(scores)) if rows else scores.index(min(scores))
        rows.append(json.dumps({"question": question, "choices": CHOICES, "answer": answer}) + "\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(rows))
    (folder / "foxes.yaml").write_text(TASK.format(folder=folder))
    return folder


def evaluate(capsys, checkpoint, folder, *options):
    arguments = ["eval", str(checkpoint), "--tasks", "foxes", "--include-path", str(folder), *options]
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_command_line(checkpoint, task_folder, capsys):
    pytest.importorskip("lm_eval")
    found = json.loads(evaluate(capsys, checkpoint, task_folder, "--json", "--device", "cpu").splitlines()[-1])
    assert found["tasks"]["foxes"]["acc,none"] == 0.8 and found["device"] == "cpu"
    text = task_folder / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 9)
    printed = evaluate(capsys, checkpoint, task_folder, "--limit", "2", "--text", str(text), "--seqlen", "32")
    assert printed.startswith("perplexity ") and "|foxes|" in printed.replace(" ", "") and "0.5" in printed


def test_its_own_way_needs_no_import(checkpoint, task_folder, installed):
    pytest.importorskip("lm_eval")
    done = installed.run("-c", EVALUATE.format(model=str(checkpoint), folder=str(task_folder)))
    assert done.returncode == 0, done.stdout
    assert "accuracy 0.8" in done.stdout
    assert str(installed.site / "crvq_hf/__init__.py") in done.stdout


def test_what_can_go_wrong(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["eval", str(checkpoint), "--tasks", "foxes"]
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(arguments) == 2
    assert "pip install 'crvq-hf[eval]'" in capsys.readouterr().err
    monkeypatch.setattr(harness, "find_spec", lambda name: sys)
    assert main([*arguments, "--include-path", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_unknown_task(checkpoint, task_folder, monkeypatch, capsys):
    tasks = pytest.importorskip("lm_eval.tasks")

    class FewTasks(tasks.TaskManager):
        """Without lm_eval's own tasks: reading them takes half a minute."""

        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", FewTasks)
    for options in ([], ["--include-path", str(task_folder)]):
        assert main(["eval", str(checkpoint), "--tasks", "foxes,no-such-task", *options]) == 2
        assert f"lm_eval has no task {'no-such-task' if options else 'foxes'!r}" in capsys.readouterr().err
