"""Agreement of two models against the definition, and what it refuses."""

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer

from crvq_hf.evaluation import agreement as module
from crvq_hf.evaluation.agreement import agreement


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"])


def other_model(**fields):
    model = tiny_model(**fields)
    with torch.no_grad():
        model.lm_head.weight[::5] *= 1.5
    return model


@pytest.mark.parametrize("chunk", [7, 256])
def test_it_is_the_definition(tokens, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    found = agreement(tiny_model(), other_model().train(), tokens, 20, 3, progress=False)
    rows = tokens[:60].view(3, 20)
    with torch.no_grad():
        p, q = (model.double()(rows).logits[:, :-1].softmax(-1) for model in (other_model(), tiny_model()))
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found.same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (found.tokens, found.windows, found.seqlen) == (57, 3, 20) and 0 < found.same < 1


def test_a_model_agrees_with_itself_and_both_stay_in_their_modes(tokens):
    model, other = tiny_model(), tiny_model().train()
    found = agreement(model, other, tokens, 32, 1, progress=False)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.same == 1
    assert other.training and not model.training


def test_another_vocabulary_and_shorter_texts(tokens):
    with pytest.raises(ValueError, match="predicts 300 tokens and the other 310; give two models of one vocabulary"):
        agreement(tiny_model(), tiny_model(vocab_size=310), tokens, 32, 1, progress=False)
    with pytest.raises(ValueError, match="seqlen must be from 2 to the 16 tokens"):
        agreement(tiny_model(), tiny_model(max_position_embeddings=16), tokens, 32, 1, progress=False)
