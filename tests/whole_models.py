"""Small models of several architectures, and settings that quantize them for real within a second."""

import torch
import transformers
from tiny import SIZES

from crvq_hf import CRVQLinear
from crvq_hf.pipeline import streams

ARCHITECTURES = {
    "llama": SIZES | {"initializer_range": 0.2},
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    },
    "qwen3_moe": SIZES
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "initializer_range": 0.2,
    },
    "gemma3_text": SIZES
    | {
        "head_dim": 8,
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.2,
    },
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
}
FIELDS = {
    "dataset": "self",
    "nsamples": 6,
    "e2e_nsamples": 10,
    "seqlen": 16,
    "nbits_per_codebook": 4,
    "critical_ratio": 0.1,
}
OFF = {"block_finetune_epochs": 0, "e2e_finetune_epochs": 0}


def make(architecture: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def use_small_steps(put) -> None:
    """Lets even a tiny run have several batches and steps, of unequal sizes."""
    put(streams, "RUN_TOKENS", 64)
    put(streams, "STEP_TOKENS", 32)


def quantized_layers(model) -> dict[str, CRVQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CRVQLinear)}


def tokens_for(model, shape=(3, 16)) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model, tokens) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def come_back_dense(model, names, tokens, folder):
    """Returns what a quantized causal model is after saving it in `folder`, loading (bit-equal) and dequantizing.

    Its tensors then have `names`, those of the dense model.
    """
    model.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = logits_of(model, tokens)
    assert torch.equal(logits_of(loaded, tokens), expected)
    dense = loaded.dequantize()
    assert dense.state_dict().keys() == names
    torch.testing.assert_close(logits_of(dense, tokens), expected, rtol=1e-3, atol=1e-3)
    return dense


def equal_state(first, second) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def random_model(seed: int = 0, embedding_bits: int = 16):
    """Returns a Llama of one block, all its linears random CRVQ layers, as it is after loading.

    Quantized embeddings are tied.
    """
    from random_models import code_embeddings
    from tiny import random_weight, tiny_model

    from crvq_hf import CRVQConfig
    from crvq_hf.modeling.embedding import quantize_embeddings_
    from crvq_hf.modeling.replace import linear_size, quantizable_linears, set_quantized_
    from crvq_hf.quantizer import CRVQQuantizer

    sizes = {"hidden_size": 576, "intermediate_size": 1024, "num_hidden_layers": 1, "initializer_range": 0.02}
    model = tiny_model(**sizes, tie_word_embeddings=embedding_bits <= 8)
    torch.manual_seed(seed)
    config = CRVQConfig(dataset=None, nbits_per_codebook=6, embedding_bits=embedding_bits)
    for name, dense in quantizable_linears(model, config)[0].items():
        set_quantized_(model, name, random_weight(config.of_layer(name).layer_shape(*linear_size(dense))))
    if embedding_bits == 8:
        quantize_embeddings_(model)
    code_embeddings(model, embedding_bits)
    CRVQQuantizer(config, pre_quantized=True).attach(model)
    return model
