"""What a quantization run depends on, and where its work folder is when the user names none."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn

from ..blocks.absent import is_absent, present
from ..blocks.runner import Inputs
from ..checkpoint.metadata import tensor_hash
from ..checkpoint.sources import file_hash
from ..config import CRVQConfig
from ..dataset.grammar import Source, has_samples, sources_of
from ..dataset.sound import sound_files

# Where runs that name no work folder have theirs.
WORK_FOLDERS = Path(HF_HOME) / "crvq"
# Rooms whose code decides what comes out: a work folder that other code has written is not continued.
_ROOMS = ("algorithm", "calibration", "dataset", "modeling", "pipeline", "tuning")
# Tokenizers that split this alike are taken for the same.
_PROBE = "Channel-relaxed vector quantization stores 1,024 weights in 1.1 bits each; naïvely, def f(x): return x\n"


# Fields of a model's config that say nothing about what it computes, at any depth; nor do private ones.
_NO_MATTER = ("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config")


@torch.no_grad()
def run_fingerprint(
    model: nn.Module, tokenizer: Any, config: CRVQConfig, samples: list[Inputs] | None = None
) -> dict[str, Any]:
    """Returns everything that decides the result, as JSON-able values by name.

    Weights enter in full, with the buffers that are saved, and so do the model's config, field by field, and samples
    that are not text, as the model is given them.
    """
    weights = hashlib.sha256()
    for name, digest in sorted(_tensor_hashes(model).items()):
        weights.update(f"{name}:{digest}\n".encode())
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(file for room in _ROOMS for file in (package / room).glob("*.py")):
        code.update(file.read_bytes())
    code.update((package / "quantized_weight.py").read_bytes())
    if not config.has_coded_embeddings:  # 8 bits come after all blocks
        config = CRVQConfig.from_dict(config.to_dict(), embedding_bits=16)
    fields = config.to_dict()
    fields["dataset"] = dataset_fingerprint(samples or fields["dataset"])
    reads_text = not samples and config.dataset not in (None, "self") and tokenizer is not None
    return {
        "tokenization": tokenizer(_PROBE)["input_ids"] if reads_text else None,
        "vocabulary": _vocabulary_hash(tokenizer) if reads_text else None,
        "model": type(model).__name__,
        "weights": weights.hexdigest(),
        "code of crvq_hf": code.hexdigest(),
        **{f"model.config.{name}": value for name, value in _plain(model.config.to_dict()).items()},
        **fields,
    }


def _tensor_hashes(model: nn.Module) -> dict[str, str]:
    """Returns the hash of each parameter and saved buffer of a model by name, one absent block read at a time."""
    hashes, saved = {}, model.state_dict(keep_vars=True).keys()
    absent = {name: block for name, block in model.named_modules() if is_absent(block)}
    inside = {id(tensor) for block in absent.values() for tensor in (*block.parameters(), *block.buffers())}

    def add(module: nn.Module, prefix: str = "", leave: Collection[int] = ()) -> None:
        buffers = {name: buffer for name, buffer in module.named_buffers(prefix) if name in saved}
        for name, tensor in {**dict(module.named_parameters(prefix)), **buffers}.items():
            if id(tensor) not in leave:
                hashes[name] = tensor_hash(tensor)

    add(model, leave=inside)
    for name, block in absent.items():
        with present(block):
            add(block, name)
    return hashes


def dataset_fingerprint(dataset: Any) -> str | None:
    """Returns what identifies the calibration data: the hash of files, texts or samples, or a dataset's name."""
    if has_samples(dataset):
        lines = [f"{name}:{tensor_hash(sample[name])}" for sample in dataset for name in ("", *sorted(sample)) if name]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if files := sound_files(dataset):
        said = [path for file in files if (path := file.with_suffix(".txt")).is_file()]
        return hashlib.sha256(repr([(file.name, file_hash(file)) for file in (*files, *said)]).encode()).hexdigest()
    if isinstance(dataset, list):
        return hashlib.sha256("\x00".join(dataset).encode()).hexdigest()
    if dataset is None:
        return None
    sources = sources_of(dataset)
    if len(sources) == 1:
        return _source_fingerprint(sources[0], dataset)
    return ",".join(f"{_source_fingerprint(source, source.spelled)}:{source.share:g}" for source in sources)


def _source_fingerprint(source: Source, spelled: str) -> str:
    """Returns what identifies a source: hashes of files, or what the user calls it."""
    if not source.is_local:
        return spelled
    path = Path(source.name)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    parts = [part for part in (source.config, source.split, source.field) if part]
    hashes = [file_hash(file) for file in files]
    found = hashes[0] if path.is_file() else hashlib.sha256(repr(hashes).encode()).hexdigest()
    return " ".join([found, *parts])


def _vocabulary_hash(tokenizer: Any) -> str | None:
    """Returns the hash of a tokenizer's tokens and their numbers, None where it does not tell them."""
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest() if vocabulary else None


def _plain(value: Any) -> Any:
    """Returns a value of a model's config as JSON has it, without what does not matter."""
    if isinstance(value, dict):
        kept = {str(name): one for name, one in value.items() if name not in _NO_MATTER}
        return {name: _plain(one) for name, one in sorted(kept.items()) if not name.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    is_json = value is None or (isinstance(value, (str, int, float)) and value == value)  # not NaN
    return value if is_json else type(value).__name__


def default_work_dir(fingerprint: dict[str, Any]) -> Path:
    """Returns the work folder of a run that names none, in the Hugging Face cache."""
    return WORK_FOLDERS / hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
