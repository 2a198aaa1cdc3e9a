"""What a run refuses, in one sentence, and how much memory it takes."""

import gc
from types import SimpleNamespace

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch.autograd.graph import saved_tensors_hooks
from whole_models import (
    OFF,
    equal_state,
    make,
    quantized_layers,
)

from crvq_hf import CRVQConfig
from crvq_hf.blocks.rehearsal import rehearse
from crvq_hf.blocks.runner import BlockRunner, Gave, State
from crvq_hf.pipeline import block_loop as pipeline
from crvq_hf.pipeline import streams
from crvq_hf.pipeline.fingerprint import run_fingerprint
from crvq_hf.pipeline.run import Run
from crvq_hf.resources import memory
from crvq_hf.resources.workfolder import WorkFolder
from crvq_hf.tuning import end_to_end

pytestmark = pytest.mark.usefixtures("precision", "quiet")

# Errors


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_no_numbers(value, quantize, tmp_path):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.self_attn\.k_proj holds NaN or infinite"):
        quantize(model)
    assert not quantized_layers(model) and not (tmp_path / "work").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_activations_that_are_no_numbers(value, quantize):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    with pytest.raises(ValueError, match=r"output of model\.layers\.1 holds NaN or infinite .*check the model"):
        quantize(model, dataset=[TEXT], tokenizer=tiny_tokenizer().__class__(tokenizer_object=small_vocabulary()))


def small_vocabulary():
    """Returns a tokenizer of 64 words for models with that vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(TEXT.replace(".", " .").split()))[:60]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_name_of_a_device_that_is_not_there(quantize):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device='cuda:0' was asked for, but torch sees no CUDA device"):
        quantize(make("llama"), device="cuda:0")


def test_activations_that_do_not_fit_are_refused():
    runner = SimpleNamespace(hidden_bytes=4e10, other_bytes=0.0)
    tokens = torch.zeros(10, 100, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"1000 calibration tokens need .* GB of memory.*lower nsamples"):
        streams.start_streams(runner, tokens, CRVQConfig(nsamples=10), None)


@pytest.mark.parametrize(("available", "fits"), [(1 << 40, True), (1 << 10, False)], ids=["enough", "too little"])
def test_memory_for_the_activations(available, fits, quantize, monkeypatch):
    """What counts is available memory: file cache is given back, and is nearly all after loading a large model."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(free=0, available=available))
    monkeypatch.setattr(memory, "_left_in_cgroups", list)
    if fits:
        quantize(make("llama", num_hidden_layers=1), **OFF)
        return
    with pytest.raises(ValueError, match="Quantizing LlamaForCausalLM needs .* of memory, 0.00 MB are free"):
        quantize(make("llama", num_hidden_layers=1), **OFF)


# Memory


def test_hidden_states_that_do_not_fit_in_memory_are_on_the_disk(quantize, monkeypatch, small_steps, tmp_path):
    model = quantize(make("llama"), "memory")
    scratch, found = WorkFolder.scratch, []
    monkeypatch.setattr(WorkFolder, "scratch", lambda *args: found.append(scratch(*args)) or found[-1])
    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    other = quantize(make("llama"), "disk")
    assert [tensor.shape for tensor in found] == [(10, 16, 32)]
    assert equal_state(model, other)
    assert not list((tmp_path / "disk").glob("scratch*"))


def test_blocks_that_do_not_fit_in_memory_are_computed_twice(quantize, monkeypatch, small_steps):
    """The end-to-end tuning of a large model: the same result, bit for bit, from less memory."""

    def kept(run) -> int:
        sizes: dict[int, int] = {}
        hooks = saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        )
        with hooks:
            loss = run()
        loss.backward()
        return sum(sizes.values())

    model, tokens = make("llama", num_hidden_layers=4), torch.arange(64)[None]
    runner = rehearse(model)
    plain = kept(lambda: model(tokens).logits.sum())
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with runner.recomputing():
        runner.arguments(
            1, State({"input_ids": tokens}, (Gave(torch.randn(1, 64, 32), []),))
        )  # puts back the blocks it has found
        assert kept(lambda: model(tokens).logits.sum()) < 0.3 * plain
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all("forward" not in block.__dict__ for block in runner.blocks)

    chosen, recomputing = [], BlockRunner.recomputing
    monkeypatch.setattr(BlockRunner, "recomputing", lambda self: chosen.append(1) or recomputing(self))
    once = quantize(make("llama"), "once", **OFF | {"e2e_finetune_epochs": 1})
    assert not chosen
    monkeypatch.setattr(end_to_end, "MEMORY_SHARE", 0.0)
    twice = quantize(make("llama"), "twice", **OFF | {"e2e_finetune_epochs": 1})
    assert chosen and equal_state(once, twice)
    assert once.crvq_report["e2e_loss"] == twice.crvq_report["e2e_loss"]


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_activations_are_held_at_most_twice_whatever_the_number_of_blocks(num_blocks, quantize, monkeypatch):
    nsamples, seqlen = 96, 32
    stream = nsamples * seqlen * 32 * 4
    call_block, calls, held = Run.call_block, [], []

    def storages():
        """Returns a storage per tensor as large as all activations; RUN_TOKENS keeps everything else smaller."""
        large = (t for t in gc.get_objects() if type(t) is torch.Tensor and not is_wrapped(t))
        return {t.untyped_storage().data_ptr() for t in large if t.untyped_storage().nbytes() >= stream}

    before = storages()  # what other tests have left

    def count(run, index, state):
        calls.append(index)
        if len(calls) % 5 == 0:
            held.append(len(storages() - before))
        return call_block(run, index, state)

    monkeypatch.setattr(Run, "call_block", count)
    monkeypatch.setattr(streams, "RUN_TOKENS", 1024)
    model = quantize(
        tiny_model(num_hidden_layers=num_blocks),
        dataset=[TEXT] * 20,
        tokenizer=tiny_tokenizer(),
        nsamples=nsamples,
        seqlen=seqlen,
        e2e_finetune_epochs=0,
    )
    assert len(held) >= 3 * num_blocks and set(held) == ({1} if num_blocks == 1 else {1, 2})
    assert model.crvq_report["activation_bytes"] == 2 * stream


def test_another_tokenizer_is_another_run(tmp_path):
    model, settings = make("llama"), CRVQConfig(dataset=["text " * 50], work_dir=str(tmp_path))
    one, other = (run_fingerprint(model, lambda text, n=n: {"input_ids": [n]}, settings) for n in (1, 2))
    assert {name for name in one if one[name] != other[name]} == {"tokenization"}


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_cost_no_gradients_end_to_end(tied, quantize, monkeypatch, small_steps):
    """Nor a cast of the head at each use: it is in the compute dtype while tuning, and as it was afterwards."""
    model, seen = make("llama", tie_word_embeddings=tied), []
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    before, loss = head.detach().clone(), end_to_end.distillation_loss

    def note(logits, teacher):
        now = model.get_output_embeddings().weight
        seen.append((now.dtype, now.requires_grad, embedding.requires_grad))
        return loss(logits, teacher)

    monkeypatch.setattr(end_to_end, "distillation_loss", note)
    monkeypatch.setattr(pipeline, "_precision", lambda *args: True)
    quantize(model, **OFF | {"e2e_finetune_epochs": 1})
    assert set(seen) == {(torch.bfloat16, False, False)}
    assert embedding.grad is None and embedding.requires_grad
    assert model.get_output_embeddings().weight is head and (embedding is head) == tied
    assert torch.equal(head, before)
