"""Adapters on quantized layers with the real PEFT; `test_peft_methods.py` has all of its methods."""

import copy
import pickle

import pytest
import torch
from random_models import quantized_model
from safetensors.torch import load_file
from tiny import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from crvq_hf import CRVQLinear
from crvq_hf.adapters import peft as adapters
from crvq_hf.adapters.dense_weight import WeightIsFrozen
from crvq_hf.modeling.replace import to_dense

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
    for name in adapters.WRAPPED:
        adapters.wrap_peft(name)  # again: once is enough
    with pytest.raises(
        ValueError, match=r"cannot be merged into quantized layers.*model.dequantize\(\) before merging"
    ):
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


def adapted_pair(architecture, config, **options):
    """Returns logits of a quantized model and of the same made dense, both with random adapters, after training."""
    found = []
    for model in (quantized_model(architecture, **options), quantized_model(architecture, **options).dequantize()):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, copy.deepcopy(config))
        tokens = torch.arange(12).view(2, 6)
        for _ in range(2):
            adapted.train()(input_ids=tokens, labels=tokens).loss.backward()
            for parameter in filter(lambda parameter: parameter.grad is not None, adapted.parameters()):
                parameter.data -= 0.05 * parameter.grad
                parameter.grad = None
        found.append(logits(adapted, tokens))
    return found


def random_lora(**fields):
    return peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize(
    ("architecture", "options", "fields"),
    [
        ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
        ("opt", {}, {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
        ("gemma3_text", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gemma3_text", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": "all-linear", "trainable_token_indices": [3, 5]}),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"embedding_bits": 16}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "lm_head"]}),
        ("llama", {"embedding_bits": 2.5}, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
        ("gemma3_text", {"embedding_bits": 2.5}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
        ("llama", {"embedding_bits": 2.5}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_as_on_the_dense_model(architecture, options, fields):
    found, expected = adapted_pair(architecture, random_lora(**fields), **options)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts(architecture, targets, tmp_path):
    """PEFT knows experts as fused parameters; in a quantized model they are linear layers."""
    tokens = torch.arange(12).view(2, 6)
    adapted = peft.get_peft_model(quantized_model(architecture), random_lora(target_modules=targets))
    wrapped = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(wrapped) == (2 * (4 + 4 * 3) if targets == "all-linear" else 2 * (1 + 4))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized_model(architecture), tmp_path)
    assert torch.equal(logits(again, tokens), logits(adapted, tokens))
    direct = quantized_model(architecture)
    direct.load_adapter(str(tmp_path))
    assert torch.equal(logits(direct, tokens), logits(adapted, tokens))


def test_adapters_of_experts_are_not_lost_in_a_dense_model():
    model, tokens = quantized_model("qwen3_moe"), torch.arange(12).view(2, 6)
    adapted = peft.get_peft_model(model, random_lora(target_modules=["down_proj"]))
    expected = logits(adapted, tokens)
    with pytest.raises(ValueError, match=r"experts of model.layers.0.mlp.experts have adapters.*unload"):
        model.dequantize()
    assert torch.equal(logits(adapted, tokens), expected)
    adapted.unload().dequantize()


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("experts.gate_up_proj", "each expert has layers of its own.*put gate_proj, up_proj and down_proj into"),
        ("q_proj.weight", "which is stored quantized; put the layer into target_modules"),
    ],
)
def test_parameters_as_targets_are_refused(target, match):
    with pytest.raises(ValueError, match=match):
        peft.get_peft_model(quantized_model("qwen3_moe"), random_lora(target_modules=[], target_parameters=[target]))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_refusal_leaves_the_model_as_it_was(init):
    model, tokens = quantized_model("llama"), torch.arange(12).view(2, 6)
    attention = model.model.layers[0].self_attn
    attention.q_proj = to_dense(attention.q_proj, torch.float32)  # what PEFT changes first
    expected, names = logits(model, tokens), [name for name, _ in model.named_modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"PEFT's LORA with these settings does not fit.*model.dequantize\(\) first"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    assert [name for name, _ in model.named_modules()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "mixed", "layer"])
def test_merging_into_8_bit_embeddings_is_refused(target, how):
    tokens = torch.arange(12).view(2, 6)
    config = random_lora(target_modules=[target])
    adapted = peft.get_peft_model(quantized_model("llama"), config, mixed=how == "mixed")
    expected = logits(adapted, tokens)
    with pytest.raises(ValueError, match=r"model.dequantize\(\)"):
        if how == "layer":
            adapted.get_submodule(f"base_model.model.{'model.' * (target == 'embed_tokens')}{target}").merge()
        else:
            getattr(adapted, "merge_and_unload" if how == "mixed" else how)()
    assert torch.equal(logits(adapted, tokens), expected)


def test_after_dequantizing_all_can_be_merged():
    model, tokens = quantized_model("llama"), torch.arange(12).view(2, 6)
    config = random_lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    expected = logits(adapted, tokens)
    model.dequantize()
    torch.testing.assert_close(logits(adapted.merge_and_unload(), tokens), expected, rtol=1e-4, atol=1e-5)


def test_unloading_leaves_a_model_that_can_be_saved(tmp_path):
    model, tokens = quantized_model("llama"), torch.arange(12).view(2, 6)
    expected = logits(model, tokens)
    unloaded = peft.get_peft_model(model, random_lora(target_modules="all-linear")).unload()
    unloaded.save_pretrained(tmp_path)
    assert torch.equal(logits(unloaded, tokens), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), expected)


def test_adapters_have_the_dtype_of_the_model():
    config = random_lora(target_modules=["q_proj", "lm_head"])
    model = quantized_model("llama", dtype=torch.bfloat16)
    adapted = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    assert {p.dtype for name, p in adapted.named_parameters() if ".lora_" in name} == {torch.bfloat16}
    assert logits(adapted, torch.arange(12).view(2, 6)).dtype == torch.bfloat16
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapters.show_dense_weights_(model)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == model.lm_head.weight.dtype == torch.float32


def test_copies_pickles_and_graphs(tmp_path):
    tokens = torch.arange(12).view(2, 6)
    adapted = peft.get_peft_model(quantized_model("llama"), random_lora(target_modules=["q_proj"], use_dora=True))
    expected = logits(adapted, tokens)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(logits(twin, tokens), expected)
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, tokens), expected)


@pytest.fixture
def offloaded(tmp_path):
    """A model whose first block is on the disk."""
    quantized_model("llama").save_pretrained(tmp_path / "model")
    here = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(here, "cpu") | {"model.layers.0": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )


def test_adapters_beside_offloaded_layers(offloaded):
    found = []
    for model in (quantized_model("llama"), offloaded):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, random_lora(target_modules=["layers.1.mlp.up_proj"], use_dora=True))
        found.append(logits(adapted, torch.arange(12).view(2, 6)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["layers.0.mlp.up_proj"], "use_dora": True},
        {"target_modules": ["layers.1.mlp.up_proj"], "modules_to_save": ["layers.0.mlp.up_proj"]},
    ],
    ids=["DoRA", "modules_to_save"],
)
def test_offloaded_weights_are_not_read(offloaded, fields):
    with pytest.raises(ValueError, match="need the weight of a layer that is offloaded; load the model without"):
        peft.get_peft_model(offloaded, random_lora(**fields))


@pytest.mark.parametrize("attribute", ["set", "delete"])
def test_a_weight_is_not_replaced(attribute):
    model = quantized_model("llama")
    adapters.show_dense_weights_(model)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(WeightIsFrozen):
        if attribute == "set":
            layer.weight = torch.nn.Parameter(torch.zeros(64, 32))
        else:
            del layer.weight
    model.load_state_dict(quantized_model("llama").state_dict())
    assert layer.packed.dtype == torch.uint8


def test_methods_that_ask_the_first_parameter():
    """XLoRA takes the dtype of the first parameter, prompt tuning what has a row per token for the embedding."""
    model = quantized_model("llama", dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(model, config)
    assert adapted.word_embeddings is model.get_input_embeddings()
    assert next(model.parameters()).dtype == torch.bfloat16
