"""What a quantization run depends on, and where its work folder is when the user names none."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn

from ..config import CRVQConfig

# Rooms whose code decides what comes out: a work folder that other code has written is not continued.
_ROOMS = ("algorithm", "modeling", "pipeline", "tuning")
# Tokenizers that split this alike are taken for the same.
_PROBE = "Channel-relaxed vector quantization stores 1,024 weights in 1.1 bits each; naïvely, def f(x): return x\n"


@torch.no_grad()
def run_fingerprint(model: nn.Module, tokenizer: Any, config: CRVQConfig) -> dict[str, Any]:
    """Returns everything that decides the result, as JSON-able values by name.

    Weights enter through at most 1024 values of each tensor: enough to tell models apart without reading them twice.
    """
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].float().cpu()
        weights.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}:".encode() + sample.numpy().tobytes())
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(file for room in _ROOMS for file in (package / room).glob("*.py")):
        code.update(file.read_bytes())
    code.update((package / "quantized_weight.py").read_bytes())
    fields = CRVQConfig.from_dict(config.to_dict(), embedding_bits=16).to_dict()  # 8 bits come after all blocks
    fields["dataset"] = _dataset_fingerprint(fields["dataset"])
    reads_text = config.dataset not in (None, "self")
    return {
        "tokenization": tokenizer(_PROBE)["input_ids"] if reads_text and tokenizer is not None else None,
        "model": type(model).__name__,
        "weights": weights.hexdigest(),
        "code of crvq_hf": code.hexdigest(),
        **fields,
    }


def _dataset_fingerprint(dataset: str | list[str] | None) -> str | None:
    """Returns what identifies the calibration text: the hash of a file's or a list's text, or a dataset's name."""
    if isinstance(dataset, str) and Path(dataset).is_file():
        return hashlib.sha256(Path(dataset).read_bytes()).hexdigest()
    if isinstance(dataset, list):
        return hashlib.sha256("\x00".join(dataset).encode()).hexdigest()
    return dataset


def default_work_dir(fingerprint: dict[str, Any]) -> Path:
    """Returns the work folder of a run that names none, in the Hugging Face cache."""
    return Path(HF_HOME) / "crvq" / hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()[:16]
