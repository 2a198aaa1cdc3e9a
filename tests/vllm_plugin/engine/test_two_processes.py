"""Two processes, each with half of every layer, write the tokens that one writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed; `make test-vllm` runs this")

import torch
from checkpoints import PROMPTS, TOKENS, transformers_writes

PROGRAM = f"""
import json, sys
from held import held
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, size, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, tensor_parallel_size=size)
    greedy = SamplingParams(temperature=0, max_tokens={TOKENS}, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{{"prompt_token_ids": prompt}} for prompt in prompts], greedy, use_tqdm=False)
    written = [list(output.outputs[0].token_ids) for output in outputs]
    print("RESULT", json.dumps([written, llm.apply_model(held)]))
"""


def run(folder: Path, size: int, tmp_path: Path) -> subprocess.CompletedProcess:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder), str(size), json.dumps(PROMPTS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send `held` to the processes
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)


def result(done: subprocess.CompletedProcess) -> list:
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (done.returncode, done.stderr[-4000:])
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["rows", "biases", "mixtral"])
def test_two_processes(made, tmp_path, name):
    folder = made(name)
    (alone, ((weights, rows),)), (written, parts) = (result(run(folder, size, tmp_path)) for size in (1, 2))
    assert written == alone == transformers_writes(folder, torch.float32, PROMPTS)
    assert [part[0] for part in parts] == [weights // 2] * 2
    assert sum(part[1] for part in parts) <= 1.1 * rows + 64 * 128  # the vocabulary is filled up


@pytest.mark.timeout(900)
def test_a_degree_that_does_not_divide(made, tmp_path):
    done = run(made("rows"), 3, tmp_path)
    assert done.returncode != 0
    assert "must be divisible by tensor parallel size (3)" in done.stderr, "vLLM's own sentence about heads"
