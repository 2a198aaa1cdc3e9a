"""Tiny random models of many architectures, and a stand-in for the algorithm: random codes and codebooks."""

import torch
import transformers
from tiny import SIZES, random_weight

from crvq_hf import CRVQConfig
from crvq_hf.modeling.embedding import distinct_tables, find_embeddings, quantize_embeddings_
from crvq_hf.modeling.replace import (
    linear_size,
    quantizable_linears,
    set_quantized_,
    unfuse_experts_to_quantize_,
)
from crvq_hf.modeling.table import TableShape
from crvq_hf.pipeline.table_fit import fit_table
from crvq_hf.pipeline.tables import place_table_
from crvq_hf.quantizer import CRVQQuantizer

MOE = SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "llama": SIZES,
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mistral": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gemma3_text": SIZES | {"head_dim": 8, "tie_word_embeddings": True},
    "phi3": SIZES,
    "gpt_neox": SIZES,
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"head_dim": 8},
}


def tiny_config(architecture: str, **changes) -> transformers.PreTrainedConfig:
    """Returns the config of a model of two layers and 32 channels."""
    values = ARCHITECTURES[architecture] | changes
    return transformers.AutoConfig.for_model(architecture, **values)


def quantize_randomly(model, tokenizer, config) -> None:
    """Does what `crvq_hf.pipeline.block_loop.quantize_blocks_` does, without looking at the weights."""
    linears, _ = quantizable_linears(model, config)
    for name, dense in linears.items():
        set_quantized_(model, name, random_weight(config.of_layer(name).layer_shape(*linear_size(dense))))


def code_embeddings(model, bits, leave=()):
    """Does what `crvq_hf.pipeline.tables.code_embeddings_` does, without a calibration text."""
    for names, weight in distinct_tables(model, find_embeddings(model, bits, leave) if bits < 8 else {}).items():
        shape, metric = TableShape(*weight.shape, bits), torch.eye(weight.shape[1])
        table, _ = fit_table(weight.float(), metric, torch.arange(5), shape, torch.Generator().manual_seed(0))
        place_table_(model, names, table.tensors())


def quantized_model(architecture: str, *, embedding_bits: int = 8, dtype: torch.dtype = torch.float32, **changes):
    """Returns a model with random codes, always the same ones, as transformers would have loaded it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype)
    config = CRVQConfig(dataset=None, embedding_bits=embedding_bits)
    unfuse_experts_to_quantize_(model, config)
    quantize_randomly(model, None, config)
    if embedding_bits == 8:
        quantize_embeddings_(model)
    code_embeddings(model, embedding_bits)
    CRVQQuantizer(config, pre_quantized=True).attach(model)
    return model.eval()
