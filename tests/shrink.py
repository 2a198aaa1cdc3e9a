"""A tiny random model of any architecture that transformers knows, made from its config class alone.

Fields are recognised by what they are called, in the config and in all configs inside it. What a class still
refuses is tried with other sizes. A few architectures have fields that only their own code explains: `EXPLICIT`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

MOST_WEIGHTS = 300_000_000
VOCABULARY = 320  # room for the 300 tokens of `tiny.tiny_tokenizer` and for special ones
# (pattern of the field's name, its size), the first that matches counts; only integers above the size are changed.
SIZES: list[tuple[str, int]] = [
    (r"(n|topk|num)_(group|groups)", 1),
    (r"qk_head_dim", 32),
    (r".*vocab.*size.*|num_embeddings|.*n_vocab|src_vocab|n_tokens|vocab", VOCABULARY),
    (r".*num_(attention_)?heads|.*attention_heads|n_heads?|num_heads|.*_n_heads|n_attn_heads|encoder_heads", 4),
    (r".*(key_value_heads|kv_heads|num_key_heads|num_k_heads|query_groups)|n_kv_head|n_groups|.*ngroups", 2),
    (r".*num_(value|v)_heads", 4),
    (r".*(experts_per_tok|top_?k|moe_topk|moe_k|experts_per_token|num_selected_experts)(_.*)?", 2),
    (r".*n_shared_experts|num_shared_experts|moe_num_shared_experts|.*zero_expert_num", 1),
    (r".*(num|n)_.*experts|num_experts|moe_num_experts|ffn_num_experts|n_routed_experts", 4),
    (r".*(num|n)_.*(layers?|blocks)|n_layers?|depth|layers|num_layers", 2),
    (r".*(head_dim|head_size|channels_per_head|d_kv|kv_channels|headdim|key_length|value_length)", 16),
    (r".*(nope|rope|rotary|_v)_(head_)?dim|rotary_dim", 16),
    (r".*lora_(rank|dim)|.*_rank|.*low_rank.*", 32),
    (r".*(intermediate|ffn|inner|mlp|fc|feed_?forward).*(size|dim|hidden)?|n_inner|d_ff|d_inner", 128),
    (r".*(moe|expert).*_(size|dim)", 64),
    (r".*(d_state|state_size|ssm_state.*)", 16),
    (r".*(hidden_?size.*|hidden_dim|d_model|n_embd|embed_dim|embed_size|embedding_size|embd_pdim|dim|width)", 64),
    (r".*(projection|output|out_hidden|input|proj)_(size|dim)|.*_dim", 64),
    (r".*(max.*positions?(_embeddings)?|max_seq_len|n_positions|n_ctx|seq_length|max_target_positions)", 128),
    (r".*(sliding_window|window_size|chunk_size|attention_chunk.*|local_window.*)", 8),
    (r"image_size", 32),
    (r"patch_size", 8),
]
KEPT = re.compile(r".*(dropout|_id|_token|_ids|version|bits|factor|period|step|interval|types?|index|kernel|stride)$")


# What classes leave open and their models need.
UNSET: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "vocabulary_map": {"<image>": VOCABULARY - 5},
}
# What is changed where a class refuses the sizes above, or its forward does: each is tried after the other.
VARIANTS: list[dict[str, Any]] = [
    {},
    {r".*(key_value_heads|kv_heads)": 4},
    {r"head_dim|head_size|d_kv": 16},
    {r".*(key_value_heads|kv_heads)": 4, r"head_dim|head_size|d_kv": 16},
    {r"num_hidden_layers|n_layers?|num_layers|.*decoder_layers": 4},
    {r"num_hidden_layers|n_layers?|num_layers|.*decoder_layers": 4, r"head_dim|head_size|d_kv": 16},
    {r"num_heads|.*mamba_n_heads": 8},
    {r".*(num|n)_.*experts|num_experts|moe_num_experts": 8, r".*k": 2},
    {r".*hidden_size|d_model|n_embd|.*embed_dim": 128},
    {r".*hidden_size|d_model|n_embd|.*embed_dim": 128, r"head_dim|head_size|d_kv": 32},
    {r".*hidden_size|d_model|n_embd|.*embed_dim": 256},
    {r"rope_parameters": {"mrope_section": [4, 2, 2]}},
    {r"num_experts": 4, r".*_intermediate_size": 64, r"top_k_experts": 2},
    {r"num_hidden_layers|n_layers?|num_layers|.*decoder_layers": 6},
]


_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2}
_HYBRID |= {"attention_hidden_size": 128, "attention_head_dim": 32}
_QUERIES = {"num_query_tokens": 4, "image_token_index": VOCABULARY - 5, "video_token_index": VOCABULARY - 5}
_DAVIT = {"embed_dim": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "num_groups": (1, 2, 2, 4)}
_TIMM = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": {"embed_dim": 192}}
# Fields, also of the configs inside, that nothing but an architecture's own code explains.
EXPLICIT: dict[str, dict[str, Any]] = {
    "blip-2": _QUERIES,
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}}},
    "florence2": {"vision_config": _DAVIT},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 4, "index_kpool": 2}},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": (1, 1)}},
    "kosmos-2": {"latent_query_num": 4},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "mistral4": {"head_dim": 32},
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "perception_lm": {"vision_config": _TIMM},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID | {"hybrid_layer_ids": [1, 3], "mamba_headdim": 16},
}
# What some models take beside text,.
BESIDE_TEXT: dict[str, list[str]] = {
    "blip": ["pixel_values"],
    "blip-2": ["pixel_values"],
    "instructblip": ["pixel_values", "qformer_input_ids"],
    "instructblipvideo": ["images", "qformer_input_ids"],
    "idefics": ["images", "image_attention_mask"],
    "kosmos-2": ["pixel_values", "image_embeds_position_mask"],
    "pix2struct": ["flattened_patches", "decoder_input_ids"],
    "pp_formulanet": ["pixel_values", "decoder_input_ids"],
    "t5gemma2": ["decoder_input_ids"],
    "udop": ["bbox", "decoder_input_ids"],
    "vision-encoder-decoder": ["pixel_values", "decoder_input_ids"],
}
NO_TEXT = ("pix2struct", "pp_formulanet", "vision-encoder-decoder")  # their encoder reads images alone


def tiny_config(architecture: str, variant: int = 0) -> PreTrainedConfig:
    """Returns a config of few channels, layers and experts."""
    config = transformers.AutoConfig.for_model(architecture)
    return _shrunk(config, VARIANTS[variant], EXPLICIT.get(architecture, {}))


def _shrunk(config: PreTrainedConfig, variant: dict[str, int], explicit: dict[str, Any]) -> PreTrainedConfig:
    fields: dict[str, Any] = {}
    before = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    for key, value in before.items():
        if isinstance(value, PreTrainedConfig):
            fields[key] = _shrunk(value, variant, explicit.get(key, {}))
        elif key in explicit:
            pass
        elif value is None:
            fields[key] = UNSET.get(key, _of(variant, key))
        elif type(value) is float and re.fullmatch(r"(init_std|.*initializer_range)", key):
            fields[key] = 0.1  # so that every part of the model counts
        elif type(value) is int:
            fields[key] = _smaller(key, value, variant)
        elif isinstance(value, list) and len(set(map(str, value))) == 1 and type(value[0]) is int:
            fields[key] = _smaller(key, value[0], variant)  # the class makes a list of it
        elif isinstance(value, dict) and "mrope_section" in value:  # of half a head
            fields[key] = value | {"mrope_section": [4, 2, 2]}
        elif isinstance(value, dict) and key in variant:
            fields[key] = value | variant[key]
        elif key == "attention_types":  # GPT-Neo's [[kinds, how often]]
            fields[key] = [[value[0][0], 1]]
    fields = {key: value for key, value in fields.items() if value is not None}
    fields |= {key: value for key, value in explicit.items() if key not in fields}
    return _built(type(config), fields | _special_tokens(before), before)


def _built(kind: type, fields: dict[str, Any], before: dict[str, Any]) -> PreTrainedConfig:
    """Returns a config of `kind`; lists with an entry a layer are cut where the class does not make them itself."""
    built = kind(**fields)
    count = getattr(built, "num_hidden_layers", None)
    old = before.get("num_hidden_layers") or before.get("num_layers") or before.get("n_layer")
    if isinstance(count, int):
        for key, value in list(vars(built).items()):
            if isinstance(value, list) and len(value) == old and old != count and not key.startswith("_"):
                fields[key] = _first_of_each_kind(value, count)
        built = kind(**fields)
    return built


def _first_of_each_kind(values: list, count: int) -> list:
    """Returns `count` of `values`: one of each kind first, in their order."""
    if all(isinstance(value, str) for value in values):
        kinds = list(dict.fromkeys(values))[:count]
        return (kinds + values)[:count]
    return values[:count]


def _smaller(key: str, value: int, variant: dict[str, int]) -> int | None:
    """Returns the size that the field `key` gets, None to leave it to the class."""
    if KEPT.fullmatch(key):
        return None
    if (size := _of(variant, key)) is not None:
        return size
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return size if value > size else None
    return None


def _of(variant: dict[str, int], key: str) -> int | None:
    return next((size for pattern, size in variant.items() if re.fullmatch(pattern, key)), None)


def _special_tokens(before: dict[str, Any]) -> dict[str, int]:
    """Returns special tokens inside the tiny vocabulary: each its own, after the 300 of the tokenizer."""
    names = [key for key, value in before.items() if re.fullmatch(r".*token_(id|index)", key) and type(value) is int]
    usual = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 0}
    others = [name for name in names if name not in usual and before[name] >= VOCABULARY - 20]
    tokens = {name: usual[name] for name in names if name in usual}
    return tokens | {name: 301 + number for number, name in enumerate(others)}


def tiny_model(architecture: str, auto_class: type) -> torch.nn.Module:
    """Returns a random model, in eval mode, that can be run on text.

    Raises:
        Exception: whatever the class raises about the sizes tried first.
    """
    first, found = None, None
    for variant in range(len(VARIANTS)):
        try:
            config = tiny_config(architecture, variant)
            torch.manual_seed(0)
            with torch.device("meta"):
                weights = sum(p.numel() for p in auto_class.from_config(config).parameters())
            if weights > MOST_WEIGHTS:
                raise ValueError(f"the smallest model that was made of it has {weights:,} weights")
            model = auto_class.from_config(config, dtype=torch.float32).eval()
            tokens = torch.arange(24).view(2, 12) * 7 % 250 + 3
            run(model, tokens)
            found = model if found is None else found
            if model.can_generate():  # a model of linear attention only raises a ValueError
                model.generate(tokens, max_new_tokens=2, do_sample=False)
            return model
        except Exception as error:
            if found is not None and not isinstance(error, ValueError):
                break
            first = first or error
    if found is None:
        raise first
    return found


@torch.no_grad()
def run(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a model, or what it returns first; what it needs beside text is made up."""
    output = model(**_inputs(model, tokens))
    return output.logits if hasattr(output, "logits") else output[0]


def _inputs(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
    """Returns what a model is called with: tokens `[batch, seqlen]`, and what it needs beside them, made up."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if config.model_type not in BESIDE_TEXT:
        return {"input_ids": tokens, "use_cache": False}

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(len(tokens), *shape, generator=generator)

    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
    image = 2 * (getattr(vision, "image_size", 32),)
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "pixel_values": lambda: some(3, *image),
        "images": lambda: some(1, 3, *image),
        "image_attention_mask": lambda: torch.ones(*tokens.shape, 1, dtype=torch.int64),
        "image_embeds_position_mask": lambda: (torch.arange(tokens.shape[1]) < config.latent_query_num) & (tokens > 0),
        "flattened_patches": lambda: some(8, 2 + vision.patch_embed_hidden_size),
        "bbox": lambda: some(tokens.shape[1], 4),
        "qformer_input_ids": lambda: tokens,
        "decoder_input_ids": lambda: tokens,
    }
    inputs = {name.replace("images", "pixel_values"): makers[name]() for name in BESIDE_TEXT[config.model_type]}
    if config.model_type in NO_TEXT:
        return inputs
    places = torch.full((len(tokens), getattr(config, "num_query_tokens", 0)), VOCABULARY - 5)  # of an image
    return {"input_ids": torch.cat([places, tokens], 1)} | inputs
