"""Tiny random models of architectures whose blocks take or give more than hidden states."""

import torch
import transformers
from tiny import SIZES

FOUR_OF_TWO_KINDS = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
}
MAMBA = {"mamba_d_state": 8, "mamba_expand": 2}
EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TWICE = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64} | {
    f"{part}_{what}": number
    for part in ("encoder", "decoder")
    for what, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
LLAMA = "LlamaConfig", SIZES
# Class, class of its config, fields of that.
MODELS = {
    "per-layer inputs, AltUp": ("Gemma3nForCausalLM", "Gemma3nTextConfig", SIZES | FOUR_OF_TWO_KINDS),
    "per-layer inputs": ("Gemma4ForCausalLM", "Gemma4TextConfig", SIZES | FOUR_OF_TWO_KINDS | {"global_head_dim": 8}),
    "embeddings given to every block": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        SIZES
        | MAMBA
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_key_value_heads": 4,
        },
    ),
    "returns a pair": (
        "BambaForCausalLM",
        "BambaConfig",
        SIZES
        | MAMBA
        | {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "attn_layer_indices": [1],
        },
    ),
    "returns a state": (
        "xLSTMForCausalLM",
        "xLSTMConfig",
        {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 16},
    ),
    "returns a list": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT),
    "a prompt before the text": (
        "CpmAntForCausalLM",
        "CpmAntConfig",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "dim_head": 8,
            "dim_ff": 64,
            "num_hidden_layers": 2,
            "prompt_length": 4,
        },
    ),
    "positions for each head and text": ("BloomForCausalLM", "BloomConfig", SIZES),
    "hyper-connections": (
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        SIZES | EXPERTS | {"head_dim": 8, "num_key_value_heads": 1},
    ),
    "indices handed on": (
        "HYV4ForCausalLM",
        "HYV4Config",
        SIZES | EXPERTS | {"num_hidden_layers": 3, "head_dim": 8, "num_experts": 4},
    ),
    "blocks that text does not reach": (
        "MllamaForCausalLM",
        "MllamaTextConfig",
        SIZES | {"num_hidden_layers": 3, "cross_attention_layers": [1], "vocab_size": 72},
    ),
    "relative positions": (
        "DebertaForMaskedLM",
        "DebertaConfig",
        SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "num_key_value_heads": 4},
    ),
    "an encoder": ("BertForMaskedLM", "BertConfig", SIZES),
    "an encoder and its decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "the same, positions learned": ("BartForConditionalGeneration", "BartConfig", TWICE),
    "pooled where padding begins": ("LlamaForSequenceClassification", *LLAMA),
    "no head": ("LlamaModel", *LLAMA),
}
REFUSED = {
    "one block for all layers": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        SIZES | {"embedding_size": 16},
        "The blocks of AlbertForMaskedLM cannot .* runs .*albert_layer_groups.0 more than once",
    ),
    "layers that recur": (
        "HrmTextForCausalLM",
        "HrmTextConfig",
        SIZES,
        "The blocks of HrmTextForCausalLM cannot .* runs .* more than once",
    ),
    "sound": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        TWICE
        | {"max_source_positions": 16, "max_target_positions": 64, "num_mel_bins": 8}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "WhisperForConditionalGeneration cannot be calibrated on text alone .it reads input_features.",
    ),
    "something kept beside the blocks": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {"vocab_size": 64, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
        r"XLMWithLMHeadModel: transformer\.\w+\.\d, run block by block, does not give what it gives in the whole",
    ),
}


def build(architecture: str, dtype: torch.dtype = torch.float32):
    """Returns a model of `MODELS` or `REFUSED`, with weights that are not small."""
    model, config, fields = (MODELS | REFUSED)[architecture][:3]
    other = {"CpmAntConfig", "XLMConfig", "BartConfig", "WhisperConfig"}
    scale = {"init_std" if config in other else "initializer_range": 0.2}
    if config == "T5Config":
        scale = {"initializer_factor": 1.5}
    torch.manual_seed(0)
    made = getattr(transformers, config)(**fields | scale)
    built = getattr(transformers, model)._from_config(made, dtype=dtype).eval()
    for name, parameter in built.named_parameters():
        if name.endswith("correct_output_scale"):  # made as zeros, with which per-layer inputs would not matter
            parameter.data.fill_(1.0)
    return built
