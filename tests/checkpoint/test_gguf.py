"""GGUF files, written here: what is loaded is a plain model with the file's weights."""

import json

import gguf
import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from crvq_hf.checkpoint.gguf import load_gguf
from crvq_hf.checkpoint.sources import load_dense
from crvq_hf.commands.cli import main

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns the rows of a query or key projection in llama.cpp's order: the halves of a head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer) -> None:
    """Writes a tied Llama as llama.cpp does, in fp32."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    kinds = [gguf.TokenType.CONTROL if token in ("<s>", "</s>") else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for name, short in NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            weight = weight if heads is None else permuted(weight, heads)
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original():
    return tiny_model(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", original, tiny_tokenizer())
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def test_weights_and_tokens_are_those_of_the_file(folder, original):
    model, tokenizer = load_gguf(folder, "tiny.gguf", torch.float32)
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokens == tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(tokens)[None, :64]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_model_is_plain(folder, tmp_path):
    model, tokenizer = load_dense(str(folder), "tiny.gguf")
    assert model.dtype == torch.bfloat16 and not model.training
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("the fox")["input_ids"] == tokenizer("the fox")["input_ids"]


def test_quantize(folder, tmp_path):
    out = tmp_path / "out"
    options = ["--dataset", str(folder / "text.txt"), "--nsamples", "2", "--seqlen", "16", "--nbits-per-codebook", "4"]
    assert main(["quantize", str(folder), str(out), "--gguf-file", "tiny.gguf", *options]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).hf_quantizer is not None


def test_a_file_that_is_not_there(folder, tmp_path, capsys):
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--gguf-file", "other.gguf"]) == 2
    assert "other.gguf" in capsys.readouterr().err.splitlines()[-1]
