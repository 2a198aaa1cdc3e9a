"""`vllm serve` with SmolLM2 in CRVQ on the CPU, asked through the openai client."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed; `make test-vllm` runs this")

import openai
import torch
from checkpoints import TEXTS, TOKENS, transformers_writes
from transformers import AutoTokenizer

pytestmark = pytest.mark.timeout(1200)
GREEDY = {
    "model": "smollm2",
    "max_tokens": TOKENS,
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
}


@pytest.fixture(scope="module")
def client(smollm2, tmp_path_factory):
    """A client of a server that runs while the tests do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).with_name("vllm"), "serve", smollm2, "--host", "127.0.0.1", "--port", port]
    command += ["--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", 512]
    with log.open("w") as out:
        server = subprocess.Popen([*map(str, command)], stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    """Returns as soon as the server answers; fails with its log if it ends or takes ten minutes."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def expected(smollm2):
    """What transformers writes after each of `TEXTS`."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [tokenizer.decode(tokens) for tokens in transformers_writes(smollm2, torch.float32, prompts)]


def complete(client, text):
    return client.completions.create(prompt=text, **GREEDY).choices[0].text


def test_eight_at_once(client, expected):
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda text: complete(client, text), TEXTS)] == expected


def test_a_chat(client):
    message = {"role": "user", "content": "What is a list?"}
    answer = client.chat.completions.create(messages=[message], **GREEDY)
    assert answer.choices[0].message.content.strip() and answer.usage.completion_tokens == TOKENS


def test_a_stream(client, expected):
    pieces = [piece.choices[0].text for piece in client.completions.create(prompt=TEXTS[0], stream=True, **GREEDY)]
    assert len(pieces) > 1 and "".join(pieces) == expected[0]
