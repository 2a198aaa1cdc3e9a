"""LoRA on CRVQ layers with the real PEFT: training, saving, reloading, merging."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from crvq_hf import CRVQLinear
from crvq_hf.modeling import adapters

peft = pytest.importorskip("peft")
BY_NAME = ["q_proj", "down_proj"]


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def tokens(checkpoint):
    tokens = AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"][:512]
    return torch.tensor(tokens).view(4, 128)


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(input_ids=tokens).logits


def with_lora(model, targets=BY_NAME):
    """Returns the model with adapters that change what it computes."""
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def stored(model) -> dict[str, torch.Tensor]:
    """Returns copies of the tensors of all CRVQ layers as they are in memory."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CRVQLinear)}
    return {f"{name}.{key}": p.clone() for name, layer in layers.items() for key, p in layer.named_parameters()}


def assert_unchanged(model, before) -> None:
    after = stored(model)
    assert len(before) == 14 * 4 and after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("targets", [BY_NAME, "all-linear"], ids=["by name", "all-linear"])
def test_training_saving_and_reloading(model, checkpoint, tokens, tmp_path, targets):
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    wrapped = [module for module in trained.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(wrapped) == (4 if targets is BY_NAME else 14)
    assert all(isinstance(module.base_layer, CRVQLinear) for module in wrapped)
    before = stored(trained)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = trained.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3 and losses == sorted(losses, reverse=True)
    assert_unchanged(trained, before)

    trained.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(wrapped) and all(".lora_" in name for name in saved)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    assert torch.equal(logits(again, tokens), logits(trained, tokens))
    direct = AutoModelForCausalLM.from_pretrained(checkpoint)
    direct.load_adapter(str(tmp_path))  # transformers' own way
    assert torch.equal(logits(direct, tokens), logits(trained, tokens))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_refused(model, tokens, how, safe_merge):
    adapted = with_lora(model)
    before, expected = stored(adapted), logits(adapted, tokens)
    adapters.refuse_merging()  # again: once is enough
    with pytest.raises(ValueError, match=r"cannot be merged into CRVQ layers.*model.dequantize\(\) before merging"):
        getattr(adapted, how)(safe_merge=safe_merge)
    assert_unchanged(adapted, before)
    assert torch.equal(logits(adapted, tokens), expected)


def test_merging_after_dequantizing(model, tokens):
    adapted = with_lora(model, "all-linear")
    expected = logits(adapted, tokens)
    model.dequantize()
    merged = adapted.merge_and_unload()
    assert not any(isinstance(module, (CRVQLinear, peft.tuners.lora.Linear)) for module in merged.modules())
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0.01, atol=0.02 * expected.std().item())


def test_adapters_of_dense_layers_can_be_merged(model, tokens):
    adapted = with_lora(model, ["lm_head"])
    before, expected = stored(model), logits(adapted, tokens)
    merged = adapted.merge_and_unload()
    assert_unchanged(merged, before)
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-3, atol=1e-4)


def test_what_peft_casts_is_saved_as_it_was(model, tokens, tmp_path):
    """`prepare_model_for_kbit_training` makes float32 of everything that is float16."""
    expected = logits(model, tokens)
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert prepared.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    prepared.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), expected)
