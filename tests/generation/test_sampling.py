"""The choice of the next token."""

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from crvq_hf.generation.sampling import next_tokens, settings, take_over_

TOKENS = torch.zeros(1, 4, dtype=torch.int64)


def draw(logits, processors=(), count=20000):
    many = logits.expand(count, -1)
    return next_tokens(many, TOKENS.expand(count, -1), LogitsProcessorList(processors), True)


def test_greedy_takes_the_largest():
    logits = torch.randn(3, 50).half()
    assert torch.equal(next_tokens(logits, TOKENS, LogitsProcessorList(), False), logits.argmax(-1))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    expected = logits.softmax(-1)[0]
    shares = draw(logits).bincount(minlength=5) / 20000
    assert shares[4] == 0
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("processors", [[TopKLogitsWarper(3)], [TopPLogitsWarper(0.7)]])
def test_only_what_is_left_is_drawn(processors):
    logits = torch.randn(1, 30)
    left = processors[0](TOKENS, logits.clone()) > float("-inf")
    assert set(draw(logits, processors).tolist()) == set(left[0].nonzero()[:, 0].tolist())


def test_draws_are_reproducible_and_leave_the_logits_alone():
    logits = torch.randn(1, 30)
    before = logits.clone()
    torch.manual_seed(0)
    first = draw(logits, count=50)
    torch.manual_seed(0)
    assert first.unique().numel() > 1
    assert torch.equal(draw(logits, count=50), first) and torch.equal(logits, before)


def test_what_a_graph_freezes_of_processors_is_told_apart():
    def penalty(*padding):
        processor = RepetitionPenaltyLogitsProcessor(1.5)
        processor.prompt_ignore_length = torch.tensor(padding)
        return LogitsProcessorList([processor])

    assert settings(penalty(1, 2)) == settings(penalty(3, 4)) != settings(penalty(1))
    assert settings(LogitsProcessorList([TopKLogitsWarper(3)])) != settings(LogitsProcessorList([TopKLogitsWarper(4)]))
    assert settings(LogitsProcessorList([TopKLogitsWarper(3)])) != settings(LogitsProcessorList([]))
    captured = penalty(1, 2)
    frozen = captured[0].prompt_ignore_length
    take_over_(captured, penalty(3, 4))
    assert frozen.tolist() == [3, 4] and captured[0].prompt_ignore_length is frozen
