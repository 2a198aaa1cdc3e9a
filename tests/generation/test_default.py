"""Where the loop is used without being asked for."""

import pytest
import torch
from test_loop import GREEDY, Listener
from tiny import tiny_tokenizer
from transformers import GenerationConfig, GenerationMixin

from crvq_hf.generation import default, loop
from crvq_hf.generation.default import generate, is_default, used_by_generate

TOKENS = torch.tensor([[7, 8]])


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(default, "FASTER_ON", frozenset({("cpu", None)}))


def used(model) -> bool:
    """Returns whether the loop has run since it was asked last."""
    found = model in loop._sessions
    loop.release(model)
    return found


def test_nothing_unmeasured_is_a_default(counting, monkeypatch):
    assert not is_default(torch.device("cpu"))
    for capability in ((9, 0), (8, 9)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            assert is_default(torch.device("cuda")) == (capability == (9, 0))
    assert torch.equal(generate(counting, TOKENS, **GREEDY, max_new_tokens=3), torch.tensor([[7, 8, 9, 10, 11]]))
    assert not used(counting)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("patched", [False, True])
def test_the_default_is_used(patched, streaming, counting, on_cpu):
    heard = []
    for ours in (False, True):
        streamer = Listener() if streaming else None
        options = GREEDY | {"max_new_tokens": 3, "streamer": streamer, "tokenizer": tiny_tokenizer()}
        if not ours:
            found = counting.generate(TOKENS, **options)
        elif patched:
            with used_by_generate():
                found = counting.generate(TOKENS, **options)
        else:
            found = generate(counting, TOKENS, **options)
        assert found.tolist() == [[7, 8, 9, 10, 11]] and used(counting) == ours
        heard.append(streamer and streamer.heard)
    assert heard[0] == heard[1]


def test_generate_is_put_back(counting, on_cpu):
    before = GenerationMixin.generate
    with pytest.raises(KeyError), used_by_generate():
        raise KeyError
    assert GenerationMixin.generate is before


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_texts_to_stop_at_are_left_to_transformers(where, counting, on_cpu, monkeypatch):
    tokenizer, tokens = tiny_tokenizer(), torch.tensor([[40, 41]])
    stop, options = [tokenizer.decode([43])], GREEDY | {"max_new_tokens": 5}
    if where == "argument":
        options["stop_strings"] = stop
    elif where == "config":
        options = {"generation_config": GenerationConfig(**options, stop_strings=stop)}
    else:
        monkeypatch.setattr(counting.generation_config, "stop_strings", stop)
    assert generate(counting, tokens, tokenizer=tokenizer, **options).tolist() == [[40, 41, 42, 43]]
    assert not used(counting)


def test_a_helping_model_is_left_to_transformers(counting, make_model, on_cpu):
    helper = make_model("llama", num_hidden_layers=1)
    found = generate(counting, TOKENS, **GREEDY, max_new_tokens=3, assistant_model=helper)
    assert found.tolist() == [[7, 8, 9, 10, 11]] and not used(counting)
