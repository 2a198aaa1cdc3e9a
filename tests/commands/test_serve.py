"""`crvq serve` and `transformers serve` with the real openai client; the ways to generate that servers use."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from crvq_hf.commands import cli, serve

PROMPTS = ["the quick brown fox", "seven wizards quietly box", "over a lazy dog while"]
SMALL_CACHE = {"num_blocks": 8, "max_batch_tokens": 64}  # else it takes most of the memory


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def greedy(model, tokens: list[int], **options) -> list[int]:
    """Returns the five tokens that the model adds."""
    written = model.generate(torch.tensor([tokens]), max_new_tokens=5, do_sample=False, **options)
    return written[0, len(tokens) :].tolist()


# Without a server


def test_static_cache(model, tokenizer):
    for prompt in PROMPTS:
        tokens = tokenizer(prompt)["input_ids"]
        assert greedy(model, tokens, cache_implementation="static") == greedy(model, tokens)


def test_continuous_batching(model, tokenizer):
    inputs = tokenizer(PROMPTS)["input_ids"]
    outputs = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=1),
        continuous_batching_config=ContinuousBatchingConfig(**SMALL_CACHE),
    )
    written = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert written == {tuple(tokens): greedy(model, tokens) for tokens in inputs}


def test_a_missing_package_is_named(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert cli.main(["serve", str(checkpoint)]) == 2
    assert "pip install 'crvq-hf[serve]'" in capsys.readouterr().err


# With a server


@pytest.fixture(scope="module", params=["crvq", "transformers"])
def client(request, checkpoint):
    """A client of a server: of our command, or of transformers' own, which nobody told about CRVQ, batching."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    arguments = [str(checkpoint), "--device", "cpu", "--host", "127.0.0.1", "--port", "0"]
    environment = dict(os.environ)
    if request.param == "crvq":
        command = [sys.executable, "-m", "crvq_hf"]
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    else:
        command = [*request.getfixturevalue("installed").python, "-m", "transformers.cli.transformers"]
        arguments += ["--continuous-batching", "--cb-num-blocks", "8", "--cb-max-batch-tokens", "64"]
    server = subprocess.Popen(
        [*command, "serve", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("The server ended: " + "".join(said))
        threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop it
        with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=100) as client:
            yield client
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("stream", [False, True])
def test_chat(client, model, tokenizer, checkpoint, stream):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = tokenizer.decode(greedy(model, tokens), skip_special_tokens=True)
    answer = client.chat.completions.create(
        model=str(checkpoint), messages=messages, max_tokens=5, temperature=0, stream=stream
    )
    if stream:
        pieces = [chunk.choices[0].delta.content for chunk in answer]
        assert sum(bool(piece) for piece in pieces) > 1
        written = "".join(piece or "" for piece in pieces)
    else:
        assert answer.usage.completion_tokens == 5
        written = answer.choices[0].message.content
    # Tokens are bytes here: the start of a character that never ends may be held back.
    assert written.rstrip("\N{REPLACEMENT CHARACTER}") == expected.rstrip("\N{REPLACEMENT CHARACTER}") != ""
