"""`decode` writes what `generate` writes."""

import gc
import logging
import weakref
from functools import partial

import pytest
import torch
from random_models import quantized_model
from transformers import CompileConfig

from crvq_hf import decode
from crvq_hf.generation import loop

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "gpt2": {},
    "qwen3_moe": {},
}


class Listener:
    """A streamer that remembers what it is told."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.fixture(autouse=True)
def look(monkeypatch):
    """Returns a function that sets how often it is looked whether all sequences have ended."""
    return lambda every: monkeypatch.setitem(loop.LOOK_EVERY, "cpu", every)


def ragged(batch: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    """Returns prompts of several lengths, padded on the left."""
    tokens = torch.randint(3, 60, (batch, length))
    mask = torch.ones_like(tokens)
    for row in range(batch - 1):
        mask[row, : 5 - 2 * row] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def both(model, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `generate` writes, and what it writes by the loop."""
    torch.manual_seed(seed)
    expected = model.generate(**options)
    torch.manual_seed(seed)
    return expected, model.generate(**options, custom_generate=decode)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_tokens(architecture, make_model):
    model = make_model(architecture, **ARCHITECTURES[architecture])
    inputs = ragged()
    expected, found = both(model, **inputs, max_new_tokens=24, **GREEDY)
    assert torch.equal(found, expected) and found.shape == (3, 36)
    expected, found = both(model, input_ids=inputs["input_ids"], max_new_tokens=10, **GREEDY)
    assert torch.equal(found, expected), "without a mask"
    sampling = GREEDY | {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.3}
    expected, found = both(model, **inputs, max_new_tokens=10, **sampling)
    assert torch.equal(found, expected), "on a CPU the draws are those of generate too"


def test_same_tokens_quantized():
    expected, found = both(quantized_model("llama"), **ragged(), max_new_tokens=24, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("every", [1, 8])
def test_sequences_end_at_every_offset(every, counting, look):
    look(every)
    tokens = torch.tensor([[5, 30, 10], [3, 4, 13], [6, 7, 20]])
    for end in range(21, 40, 1 if every == 8 else 6):
        options = GREEDY | {"eos_token_id": end, "max_new_tokens": 27}
        expected, found = both(counting, input_ids=tokens, **options)
        assert torch.equal(found, expected)
        assert found.shape[1] == 3 + min(27, end - 10) and (found == end).sum() >= 2
    expected, found = both(counting, input_ids=tokens, **GREEDY | {"eos_token_id": [15, 22], "max_new_tokens": 27})
    assert torch.equal(found, expected) and found.tolist() == [
        [5, 30, 10, 11, 12, 13, 14, 15],
        [3, 4, 13, 14, 15, 0, 0, 0],
        [6, 7, 20, 21, 22, 0, 0, 0],
    ]


@pytest.mark.parametrize("new", [1, 2, 8, 9])
def test_few_tokens(new, counting, look):
    look(8)
    expected, found = both(counting, input_ids=torch.tensor([[7, 8]]), **GREEDY, max_new_tokens=new)
    assert torch.equal(found, expected) and found.shape == (1, 2 + new)


def test_more_tokens_than_the_shortest_cache(counting, monkeypatch):
    monkeypatch.setattr(loop, "SHORTEST_CACHE", 4)
    for new in (2, 3, 14, 30):  # 4, 5, 16 and 32 in all
        expected, found = both(counting, input_ids=torch.tensor([[7, 8]]), **GREEDY, max_new_tokens=new)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("end", [None, 22])
def test_a_streamer_hears_what_it_hears_of_generate(every, end, counting, look):
    look(every)
    heard = []
    for custom in (False, True):
        streamer = Listener()
        options = {"streamer": streamer} | ({"custom_generate": partial(decode, streamer=streamer)} if custom else {})
        tokens = torch.tensor([[7, 8]])
        counting.generate(tokens, max_new_tokens=19, **GREEDY | {"eos_token_id": end}, **options)
        heard.append(streamer.heard)
    assert heard[0] == heard[1] and len(heard[0]) == 2 + (19 if end is None else 14)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam_search keeps more than one sequence"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate asks for more than tokens"),
        ({"max_time": 100.0}, "it does not know MaxTimeCriteria"),
        ({"no_repeat_ngram_size": 2}, "it does not know NoRepeatNGramLogitsProcessor"),
        ({"use_cache": False}, "use_cache is False"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation keeps more than one sequence"),
    ],
)
def test_transformers_does_the_rest(options, reason, counting, caplog):
    caplog.set_level(logging.INFO, "crvq")
    tokens = torch.tensor([[7, 8]])
    for _ in range(2):
        expected, found = both(counting, input_ids=tokens, max_new_tokens=5, **GREEDY | options)
        assert type(found) is type(expected)
        assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    assert [record.message for record in caplog.records if reason in record.message], caplog.text
    assert len(caplog.records) == 1, "said once"


def test_a_mode_that_is_not_there_is_refused(counting):
    with pytest.raises(ValueError, match=r"contrastive_search is not part of transformers; leave custom_generate"):
        counting.generate(torch.tensor([[7]]), penalty_alpha=0.5, top_k=4, custom_generate=decode, max_new_tokens=2)


def test_a_session_is_kept_for_calls_like_it(counting, monkeypatch):
    def session(batch: int, new: int, **options) -> loop.Session:
        tokens = torch.tensor([[7, 8]] * batch)
        expected, found = both(counting, input_ids=tokens, max_new_tokens=new, **GREEDY | options)
        assert torch.equal(found, expected)
        return loop._sessions[counting]

    first = session(1, 5)
    assert session(1, 9) is first
    assert session(2, 5) is not first
    assert session(1, 5) is not first, "only the last one is kept"
    drawing = session(1, 5, do_sample=True, temperature=0.5)
    assert session(1, 5, do_sample=True, temperature=0.5) is drawing
    assert session(1, 5, do_sample=True, temperature=0.6) is not drawing
    monkeypatch.setattr(loop, "SHORTEST_CACHE", 4)
    longer = session(1, 60)
    assert session(1, 14) is longer and longer.length == 64, "four times as long as it need be"
    assert session(1, 6).length == 8
    assert session(1, 7).length == 16
    loop.release(counting)
    assert counting not in loop._sessions


def test_a_session_does_not_keep_the_model(make_model):
    model = make_model("llama")
    model.generate(torch.tensor([[7, 8]]), max_new_tokens=5, **GREEDY, custom_generate=decode)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("mode", "ours"), [("reduce-overhead", "default"), ("max-autotune-no-cudagraphs", None)])
def test_a_compiler_makes_no_graphs_of_its_own(mode, ours, counting, monkeypatch):
    asked = []
    monkeypatch.setattr(counting, "get_compiled_call", lambda config: asked.append(config) or "compiled")
    assert loop._forward(counting, None) is counting and asked == []
    assert loop._forward(counting, CompileConfig(mode=mode, dynamic=False)) == "compiled"
    assert asked[0].mode == (ours or mode) and asked[0].dynamic is False


def test_an_error_leaves_the_loop_usable(counting):
    class Cancelled(Exception):
        pass

    class Impatient(Listener):
        def put(self, value):
            super().put(value)
            if len(self.heard) > 3:
                raise Cancelled

    with pytest.raises(Cancelled):
        counting.generate(
            torch.tensor([[7, 8]]), max_new_tokens=9, **GREEDY, custom_generate=partial(decode, streamer=Impatient())
        )
    expected, found = both(counting, input_ids=torch.tensor([[7, 8]]), max_new_tokens=9, **GREEDY)
    assert torch.equal(found, expected)
