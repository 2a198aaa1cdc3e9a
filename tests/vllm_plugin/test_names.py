"""Names of what a checkpoint has codes for, and which layers of vLLM are these."""

import pytest
from random_models import tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from crvq_hf import CRVQConfig
from crvq_hf.checkpoint.headers import read_headers
from crvq_hf.vllm.names import ExactRenaming, StoredNames, names_of_experts, original_names


class Prefix:
    """A mapper as vLLM's models have one."""

    def __init__(self, old, new):
        self.old, self.new = old, new

    def map_name(self, name):
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


def layers(*names):
    return [f"model.layers.0.self_attn.{name}_proj" for name in names]


def test_names_of_a_checkpoint(checkpoint):
    names = StoredNames.of_checkpoint(read_headers(checkpoint), CRVQConfig(nbits_per_codebook=4))
    assert {*layers("q", "k", "v", "o")} <= names.quantized
    assert names.all_quantized(layers("q", "k", "v"), "qkv_proj")
    assert not names.all_quantized(["lm_head"], "lm_head")
    assert not names.has_rows("", False) and not names.has_rows("lm_head", True)


def test_a_tensor_is_missing(checkpoint):
    tensors = read_headers(checkpoint)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    with pytest.raises(ValueError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight_scale; it is"):
        StoredNames.of_checkpoint(tensors, CRVQConfig())


def test_a_dense_checkpoint(checkpoint):
    tensors = {"lm_head.weight": read_headers(checkpoint)["lm_head.weight"]}
    with pytest.raises(ValueError, match="none of the 1 tensors of the checkpoint belongs to a CRVQ layer; remove"):
        StoredNames.of_checkpoint(tensors, CRVQConfig())


def test_a_fused_layer_that_is_partly_dense():
    names = StoredNames({*layers("q", "v")})
    with pytest.raises(ValueError, match="k_proj is dense in the checkpoint and the others quantized; quantize again"):
        names.all_quantized(layers("q", "k", "v"), "model.layers.0.self_attn.qkv_proj")
    experts = StoredNames({"mlp.experts.0.up_proj"})
    with pytest.raises(ValueError, match=r"of which mlp.experts.1.up_proj is dense"):
        experts.all_quantized(names_of_experts("mlp.experts", 2, ["up_proj"]), "mlp.experts")


def test_settings_of_some_layers(checkpoint):
    config = CRVQConfig(
        nbits_per_codebook=4, overrides={"layers.0": {"critical_ratio": 1.0}, "v_proj": {"nbits_per_codebook": 8}}
    )
    names = StoredNames.of_checkpoint(read_headers(checkpoint), config)
    found = names.renamed(Prefix("model.", "vllm.")).config(
        ["vllm.layers.0.self_attn.q_proj", "vllm.layers.0.self_attn.k_proj"], config
    )
    assert (found.critical_ratio, found.nbits_per_codebook) == (1.0, 4)
    assert names.config(layers("o"), config) is names.config(["model.layers.0.mlp.up_proj"], config)
    assert names.config(["model.layers.1.mlp.up_proj"], config).critical_ratio == config.critical_ratio
    with pytest.raises(
        ValueError, match="vLLM makes one layer of .*q_proj and .*v_proj, for which the overrides .* set different"
    ):
        names.config(["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"], config)


def test_renamed():
    names = StoredNames({"model.language_model.layers.0.up_proj"}, {"lm_head"}, {"model.norm"})
    renamed = names.renamed(Prefix("model.language_model.", "language_model.model."))
    assert renamed == StoredNames({"language_model.model.layers.0.up_proj"}, {"lm_head"}, {"model.norm"})
    assert names.renamed(Prefix("lm_head.", "language_model.lm_head.")).rows == {"language_model.lm_head"}


def test_embeddings_in_codes_are_refused():
    with pytest.raises(ValueError, match=r"vLLM cannot run embeddings of 2.5 bits.*crvq serve"):
        StoredNames.of_checkpoint({}, CRVQConfig(embedding_bits=2.5))


@pytest.mark.parametrize(
    ("rows", "others", "embedding", "head"),
    [
        (["model.embed_tokens", "lm_head"], [], True, True),
        (["model.embed_tokens"], [], True, True),  # the head is tied
        (["model.embed_tokens"], ["lm_head"], True, False),
        (["lm_head"], ["model.embed_tokens"], False, True),
        ([], ["model.embed_tokens"], False, False),
    ],
)
def test_embeddings_and_heads(rows, others, embedding, head):
    names = StoredNames(set(), {*rows}, {*others})
    assert names.has_rows("model.embed_tokens", False) == names.has_rows("", False) == embedding
    assert names.has_rows("lm_head", True) == head


@pytest.mark.parametrize(
    ("architecture", "own", "original"),
    [
        ("mixtral", "model.layers.1.mlp.experts.7.up_proj.weight_scale", "block_sparse_moe.experts.7.w3.weight_scale"),
        ("mixtral", "model.layers.1.mlp.gate.weight", "block_sparse_moe.gate.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.7.up_proj.weight", None),
        ("llama", "model.layers.1.mlp.up_proj.weight", None),
    ],
)
def test_names_of_original_checkpoints(architecture, own, original):
    config = tiny_config(architecture)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    expected = {own: f"model.layers.1.{original}"} if original else {}
    assert original_names(config, [own, "lm_head.weight"]) == expected
    renaming = ExactRenaming(expected)
    assert renaming.rename_source_key(own) == (expected.get(own, own), None)
    assert renaming.rename_source_key("layers.1.mlp.gate.weight") == ("layers.1.mlp.gate.weight", None)


def test_names_of_an_unknown_model():
    assert original_names(tiny_config("llama"), ["model.norm.weight"]) == {}
