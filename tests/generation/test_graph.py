"""Steps out of a graph, by the double in `recorded`: what a graph can hold, and what must not get into one."""

import logging

import pytest
import recorded
import torch
from random_models import quantized_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crvq_hf import decode
from crvq_hf.generation import graph, loop
from crvq_hf.modeling.linear import CRVQLinear

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 24}
SAMPLED = GREEDY | {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "min_p": 0.01}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "gpt2": {},
    "qwen3_moe": {},
}


@pytest.fixture(autouse=True)
def doubles(graphs, monkeypatch, caplog):
    monkeypatch.setitem(loop.LOOK_EVERY, "cpu", 8)
    caplog.set_level(logging.INFO, "crvq")


def prompts(padding: int = 5) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def same(model, inputs, **options) -> bool:
    torch.manual_seed(1)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(1)
    return torch.equal(model.generate(**inputs, **options, custom_generate=decode), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graph_holds_the_step(architecture, make_model):
    model = make_model(architecture, **ARCHITECTURES[architecture])
    for padding in (5, 2):  # the second call begins with the graph of the first
        assert same(model, prompts(padding), **GREEDY)
        assert loop.uses_graph(model)
    session = loop._sessions[model]
    assert same(model, prompts(), **GREEDY | {"max_new_tokens": 2}) and loop._sessions[model] is session


def test_a_graph_holds_the_draw(make_model):
    model = make_model("llama")
    for padding in (5, 2):
        assert same(model, prompts(padding), **SAMPLED | {"repetition_penalty": 1.3})
        assert loop.uses_graph(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_stays_on_its_device(architecture, make_model):
    """To bring a tensor from the CPU is to wait. Here the device is "meta", which has no numbers to look at either."""
    model = make_model(architecture, **ARCHITECTURES[architecture])
    assert same(model, prompts(), **SAMPLED | {"eos_token_id": [61, 62]})
    session = loop._sessions[model]
    if architecture == "qwen3_moe":
        model.set_experts_implementation("batched_mm")  # as transformers does on a GPU
    model.to("meta")
    for holder in (session, session.cache, *session.cache.layers):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, value.to("meta"))
    with Elsewhere() as elsewhere, torch.no_grad():
        session._step(model, model)
    assert elsewhere.mixed == [] and elsewhere.calls > 100
    with Elsewhere() as elsewhere:
        session.token + torch.tensor([1]).to("meta")
    assert elsewhere.mixed == ["aten::_to_copy"]


class Elsewhere(TorchDispatchMode):
    """Counts operations, and names those that join devices; a number of the CPU goes with the launch of a kernel."""

    def __init__(self):
        super().__init__()
        self.calls, self.mixed = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        self.calls += 1
        if len({tensor.device for tensor in tensors if tensor.dim() or func is torch.ops.aten._to_copy.default}) > 1:
            self.mixed.append(func._schema.name)
        return result


def test_a_graph_is_told_where_other_prompts_begin(make_model):
    model = make_model("llama")
    for padding in (11, 1):
        assert same(model, prompts(padding), **GREEDY | {"repetition_penalty": 9.0})
        assert loop.uses_graph(model)


def test_a_graph_holds_crvq_layers(monkeypatch):
    monkeypatch.setattr(CRVQLinear, "_cpu_layer", lambda self: None)  # it is called past PyTorch's dispatcher
    model = quantized_model("llama")
    assert same(model, prompts(), **GREEDY) and loop.uses_graph(model)


def without(model, caplog, reason: str) -> None:
    """Asserts that there is no graph, for a reason that is said once, and that the tokens are right."""
    inputs = prompts()
    assert same(model, inputs, **GREEDY) and same(model, inputs, **GREEDY)
    assert not loop.uses_graph(model)
    said = [record.message for record in caplog.records if "without a CUDA graph" in record.message]
    assert len(said) == 1 and reason in said[0]


def test_a_model_that_waits_has_no_graph(caplog):
    without(quantized_model("qwen3_moe"), caplog, "would wait")  # goes through the experts that were chosen


def test_a_count_in_python_is_seen(make_model, caplog):
    model = make_model("llama")
    norm = model.model.norm
    norm.calls, forward = 0, norm.forward

    def counting(hidden_states):
        norm.calls += 1
        return forward(hidden_states) * (1 + norm.calls % 2)

    norm.forward = counting
    without(model, caplog, "counts tokens in Python")


def test_hooks_are_not_left_out(make_model, caplog):
    model = make_model("llama")
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    without(model, caplog, "hooks")
    assert len(calls) == 4 * 24


def test_a_failing_capture_is_survived(make_model, monkeypatch, caplog):
    def capture(step):
        raise RuntimeError("CUDA error: a reason\nand more")

    monkeypatch.setattr(graph, "capture", capture)
    without(make_model("llama"), caplog, "capturing a step failed (CUDA error: a reason)")


def change_weight(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))


def change_flag(model):
    model.model.layers[0].mlp.switched_off = True


def add_hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.roll(1, -1))


@pytest.mark.parametrize("change", [change_weight, change_flag, add_hook])
def test_a_changed_model_gets_a_new_graph(change, make_model):
    model, inputs = make_model("llama", tie_word_embeddings=False), prompts()
    assert same(model, inputs, **GREEDY)
    session = loop._sessions[model]
    change(model)
    assert same(model, inputs, **GREEDY)
    assert loop._sessions[model] is not session


def test_weights_changed_in_place_are_read_anew(make_model):
    model, inputs = make_model("llama"), prompts()
    assert same(model, inputs, **GREEDY)
    model.lm_head.weight.data.copy_(model.lm_head.weight.roll(1, 0))
    session = loop._sessions[model]
    assert same(model, inputs, **GREEDY) and loop._sessions[model] is session


@pytest.mark.parametrize("waits", [False, True])
def test_the_switch_for_waiting_is_put_back(waits, monkeypatch):
    """The real `watch`, without its device."""
    monkeypatch.undo()
    modes, total, runs = [1], torch.zeros(1), []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(graph, "_aside", lambda step: step())

    def step():
        total.add_(1)
        runs.append(modes[-1])
        if waits and modes[-1] == "error":
            raise RuntimeError("called a synchronizing operation\nsomewhere")

    if waits:
        with pytest.raises(graph.GraphError, match=r"waits for the device \(called a synchronizing operation\)$"):
            graph.watch(step, [total])
    else:
        graph.watch(step, [total])
    assert total.item() == 1 and modes[-1] == 1 and runs == ["error", 1][: 1 + waits]


def test_the_double_freezes_what_python_computed():
    counter, total = [0], torch.zeros(1)

    def step():
        counter[0] += 1
        total.add_(counter[0])

    replay = recorded.capture(step)
    assert total.item() == 0, "capturing changes nothing"
    replay(), replay()
    assert total.item() == 2 and counter == [1]
