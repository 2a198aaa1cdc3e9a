"""Perplexity against the definition, windows, memory; reading text; speed."""

import math

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer

from crvq_hf.evaluation import perplexity as evaluate
from crvq_hf.evaluation.perplexity import perplexity, read_text_tokens, tokens_per_second


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def expected(model, tokens, seqlen, windows) -> float:
    """The definition, token by token."""
    losses = []
    for window in range(windows):
        row = tokens[window * seqlen : (window + 1) * seqlen]
        logits = model.double()(input_ids=row[None]).logits[0]
        for i in range(1, seqlen):
            losses.append(-torch.log_softmax(logits[i - 1], -1)[row[i]])
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_perplexity_is_the_definition(tokens, chunk, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    result = perplexity(tiny_model(), tokens, seqlen=20, windows=3, progress=False)
    assert result.value == pytest.approx(expected(tiny_model(), tokens, 20, 3), rel=1e-5)
    assert (result.windows, result.seqlen, result.tokens) == (3, 20, 3 * 19)
    assert result.seconds > 0


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tokens):
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tokens, 32, 2, progress=False).value == pytest.approx(300, rel=1e-5)


def test_windows_that_are_not_there_are_not_counted(tokens):
    short = tokens[:70]
    assert perplexity(tiny_model(), short, 32, 10, progress=False).windows == 2
    assert perplexity(tiny_model(), short, 32, None, progress=False).windows == 2
    exact = perplexity(tiny_model(), short[:64], 32, 10, progress=False)
    assert exact.value == perplexity(tiny_model(), short, 32, 10, progress=False).value


def test_the_model_stays_in_its_mode(tokens):
    model = tiny_model(attention_dropout=0.9).train()
    value = perplexity(model, tokens, 32, 1, progress=False).value
    assert model.training
    assert value == perplexity(model.eval(), tokens, 32, 1, progress=False).value
    assert not model.training


def test_hopeless_models_are_infinitely_perplexed(tokens):
    model = tiny_model()
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, tokens, 32, 1, progress=False).value == math.inf


@pytest.mark.parametrize(
    ("length", "seqlen", "windows", "message"),
    [
        (31, 32, 1, "31 tokens, fewer than one window of 32"),
        (200, 129, 1, "from 2 to the 128 tokens the model takes, got 129"),
        (200, 1, 1, "got 1"),
        (200, 32, 0, "windows must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tokens, length, seqlen, windows, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model(), tokens[:length], seqlen, windows, progress=False)


def test_text_is_read_whole_without_special_tokens(tokenizer, tokens, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    found = read_text_tokens(tokenizer, file)
    assert found.dtype == torch.int64 and torch.equal(found, tokens)
    assert tokenizer.bos_token_id not in found


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is no file"), (b" \n", "is empty"), (b"abc \xff\xfe", "is not UTF-8")]
)
def test_text_that_is_none_is_refused(tokenizer, tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text_tokens(tokenizer, file)


def test_speed_counts_the_tokens_written(tokenizer, monkeypatch):
    model, written = tiny_model(), []
    generate = model.generate

    def recorder(*args, **kwargs):
        output = generate(*args, **kwargs)
        written.append(output.shape[1] - args[0].shape[1])
        return output

    monkeypatch.setattr(model, "generate", recorder)
    clock = iter([10.0, 20.0, 22.0])  # start of the first run, start and end of the second
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    assert tokens_per_second(model, tokenizer, 6) == 3.0
    assert written == [2, 6]
    with pytest.raises(ValueError, match="at least 1"):
        tokens_per_second(model, tokenizer, 0)
