"""What a model writes: a few short texts, for a reader to compare with those of another model."""

from typing import Any

import torch
from torch import nn

from ..calibration.text import check_tokens, longest_text
from ..generation.default import generate

# Of no user, so that what follows them may be shared. Messages to a chat model, starts of a text for others.
PROMPTS = (
    "The capital of France is",
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "def is_prime(n):",
)
_SAMPLE_TOKENS = 48
TEMPERATURE = 0.6  # the likeliest tokens alone end in a phrase that repeats, in small models of few bits


def prompt_tokens(tokenizer: Any, prompt: str, raw: bool = False) -> dict[str, torch.Tensor]:
    """Returns what `generate` takes for a prompt: `input_ids` and `attention_mask`, `[1, tokens]`.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: a message for one with a chat template, else the start of a text.
        raw: take the prompt as the start of a text in any case.

    Raises:
        ValueError: the prompt is empty.
    """
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if tokens["input_ids"].numel() == 0:
        raise ValueError("The prompt is empty; give some text.")
    return tokens


def write(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    raw: bool = False,
    new_tokens: int = _SAMPLE_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> str:
    """Returns what a model writes after a prompt.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer.
        prompt: see `prompt_tokens`.
        raw: see `prompt_tokens`.
        new_tokens: at most.
        temperature: 0 for the likeliest token, else tokens are drawn, the likelier the more often.
        seed: of what is drawn; the caller's random numbers stay as they are.

    Raises:
        ValueError: the prompt is empty, or has tokens that the model does not have.
    """
    tokens = prompt_tokens(tokenizer, prompt, raw)
    check_tokens(model, tokens["input_ids"])
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = generate(model, **tokens.to(model.device), max_new_tokens=new_tokens, **how)
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def write_samples(model: nn.Module, tokenizer: Any) -> list[str]:
    """Returns what a model writes after each of `PROMPTS`."""
    longest = longest_text(model) or 2 * _SAMPLE_TOKENS
    return [write(model, tokenizer, prompt, new_tokens=min(_SAMPLE_TOKENS, longest // 2)) for prompt in PROMPTS]
