"""A tiny random Llama, a tokenizer trained on a few lines, and text for them: all that the command line needs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network

from pathlib import Path

import torch
from crvq_kernels import pack_codes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crvq_hf.quantized_weight import LayerShape, QuantizedWeight, encode_codebooks, order_dtype

# What the configs of most architectures have in common.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly box five dozen liquor jugs".split()
TEXT = "\n".join(" ".join(WORDS[(7 * i + i * i * j) % len(WORDS)] for j in range(12)) + "." for i in range(60))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_model(**changes) -> LlamaForCausalLM:
    """Returns a random model of two layers and 32 channels that takes 128 tokens."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | changes)).eval()


def save_tiny(folder: Path) -> Path:
    """Saves the model and its tokenizer in `folder`, the text beside them in text.txt; returns the folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def random_weight(shape: LayerShape) -> QuantizedWeight:
    """Returns a quantized weight of the given shape with random contents."""
    codes = torch.randint(shape.codebook_size, (shape.out_features, shape.num_virtual_groups))
    codebooks = torch.randn(shape.num_codebooks, shape.codebook_size, shape.in_group_size).mul(0.3)
    return QuantizedWeight(
        codes=pack_codes(codes, shape.nbits),
        codebooks=encode_codebooks(codebooks) if shape.codebook_bits == 8 else codebooks.half(),
        scales=torch.rand(shape.out_features).add(0.1).half(),
        channel_order=torch.randperm(shape.in_features).to(order_dtype(shape.in_features)),
        nbits=shape.nbits,
        num_critical_groups=shape.num_critical_groups,
    )
