"""Whether one architecture comes through: quantized, saved, loaded, run block by block, dequantized."""

from __future__ import annotations

import logging
import math
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import shrink
import torch
import transformers
from tiny import TEXT, tiny_tokenizer
from transformers.models.auto import modeling_auto

import crvq_hf
from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.blocks.rehearsal import rehearse
from crvq_hf.blocks.runner import State, run_on
from crvq_hf.blocks.trees import hidden_of
from crvq_hf.pipeline import block_loop

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
FIELDS = {
    "dataset": [TEXT],
    "nsamples": 2,
    "e2e_nsamples": 2,
    "seqlen": 16,
    "nbits_per_codebook": 4,
    "critical_ratio": 0.1,
    "embedding_bits": 8,
}
RIGHT, REFUSED, WRONG, BEFORE, AFTER, UNBUILT = (
    "right", "refused", "wrong", "crashed before the work", "crashed after it had begun", "could not be built",
)  # fmt: skip


@dataclass
class Verdict:
    """What became of one architecture.

    Attributes:
        architecture: its model type.
        verdict: one of the above.
        dense: share of the weights of its blocks that stay dense, None if it was not quantized.
        why: the sentence of a refusal, or what went wrong where.
    """

    architecture: str
    verdict: str
    dense: float | None = None
    why: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


def architectures() -> list[str]:
    """Returns the model types of all causal and image-text models that transformers knows."""
    return sorted({*CAUSAL, *IMAGE_TEXT})


def auto_class(architecture: str) -> type:
    """Returns the class that makes a model with logits of it."""
    return transformers.AutoModelForCausalLM if architecture in CAUSAL else transformers.AutoModelForImageTextToText


def check(architecture: str, **fields) -> Verdict:
    """Returns what became of one architecture; `fields` are of `CRVQConfig`.

    What is refused with the advice to quantize on weights alone is tried like that too, and must then be right.
    """
    verdict = _check(architecture, FIELDS | fields)
    if verdict.verdict != REFUSED or "dataset=None" not in verdict.why:
        return verdict
    alone = _check(architecture, FIELDS | fields | {"dataset": None})
    if alone.verdict != RIGHT:
        return Verdict(architecture, alone.verdict, alone.dense, f"with dataset=None: {alone.why}")
    return Verdict(architecture, REFUSED, alone.dense, verdict.why)


def _check(architecture: str, fields: dict) -> Verdict:
    try:
        model = shrink.tiny_model(architecture, auto_class(architecture))
    except Exception as error:
        return Verdict(architecture, UNBUILT, why=_sentence(error))
    writes, begun = _writes(model), []
    quantize_block_ = block_loop.quantize_block_
    block_loop.quantize_block_ = lambda *args, **kwargs: (begun.append(True), quantize_block_(*args, **kwargs))[1]
    step = "quantizing"
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = CRVQConfig(**fields, work_dir=Path(folder) / "work")
            quantize_model(model, tiny_tokenizer(), config)
            for step, attempt in _steps(model, writes, Path(folder), fields["dataset"] is not None).items():
                problem = attempt()
                if problem:
                    return Verdict(architecture, WRONG, model.crvq_report["dense_share"], f"{step}: {problem}")
    except Exception as error:
        logging.getLogger("sweep").debug("%s", architecture, exc_info=True)
        if isinstance(error, ValueError) and not begun and _is_ours(error):
            return Verdict(architecture, REFUSED, why=_sentence(error))
        return Verdict(
            architecture, AFTER if begun else BEFORE, why=f"{step}: {type(error).__name__}: {_sentence(error)}"
        )
    finally:
        block_loop.quantize_block_ = quantize_block_
    return Verdict(architecture, RIGHT, model.crvq_report["dense_share"])


def _steps(model, writes: bool, folder: Path, calibrated: bool) -> dict[str, Callable[[], str]]:
    """Returns what is tried with a quantized model: by name, what says what is wrong, or an empty string."""
    tokens = torch.arange(32).view(2, 16) * 7 % 250 + 3
    expected = shrink.run(model, tokens)

    def alive() -> str:
        return "" if expected.isfinite().all() and expected.abs().max() > 0 else "not finite, or all 0"

    def saved() -> str:
        model.save_pretrained(folder / "crvq")
        return ""

    def loaded() -> str:
        again = shrink.run(type(model).from_pretrained(folder / "crvq"), tokens)
        return "" if torch.equal(again, expected) else "other logits than before"

    def written() -> str:
        if not writes:  # nor did the dense model
            return ""
        length = model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[-1]
        return "" if length in (3, 4, 19) else f"{length} tokens"

    return {
        "logits": alive,
        "saving": saved,
        "loading": loaded,
        "block by block": lambda: _difference(*_by_blocks(model, tokens), 1e-4) if calibrated else "",
        "generating": written,
        "dequantizing": lambda: _difference(shrink.run(model.dequantize(), tokens), expected, 1e-2),
    }


def _writes(model) -> bool:
    """Returns whether a model can generate from text alone."""
    try:
        model.generate(torch.arange(3, 11)[None], max_new_tokens=2, do_sample=False)
    except Exception:  # whatever a model raises that wants an image, or has no attention to cache
        return False
    return True


@torch.no_grad()
def _by_blocks(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what running block after block gives, as calibration does, and what the model gives for text."""
    runner, state = rehearse(model), State({"input_ids": tokens})
    for index in runner.order:
        state = state.then(runner.call(index, runner.arguments(index, state)), runner.lists[index])
    return hidden_of(runner.output(state)), hidden_of(run_on(runner.model, {"input_ids": tokens}))


def _difference(found: torch.Tensor, expected: torch.Tensor, most: float) -> str:
    error = float((found - expected).norm() / expected.norm())
    return f"relative error {error:.2g}" if not error <= most or math.isnan(error) else ""


def _is_ours(error: Exception) -> bool:
    """Returns whether an error was raised in crvq_hf, not in the code of a model."""
    return str(Path(crvq_hf.__file__).parent) in traceback.extract_tb(error.__traceback__)[-1].filename


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
