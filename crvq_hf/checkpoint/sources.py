"""A model by the name a user gives: a folder, a hub id, or a GGUF file in one of them; and how it is to be loaded.

Loading options are those of `from_pretrained` that say where files are and whether code of theirs may run:
`revision`, `subfolder`, `trust_remote_code`, `cache_dir`, `token` and so on. Config, weights and tokenizer get the
same.
"""

import glob
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from ..resources.device import compute_device
from .blockwise import empty_model, load_if_large
from .gguf import load_gguf

logger = logging.getLogger("crvq")

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# A file of a model in a cache of the hub.
_CACHED = re.compile(r"(?P<cache_dir>.*)/models--[^/]+/snapshots/(?P<revision>[^/]+)/(?:(?P<subfolder>.+)/)?[^/]+")
# Options that hold for any repository, and those that belong to that of the model.
_GENERAL = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "trust_remote_code")
OF_THE_MODEL = ("revision", "subfolder")
# Files in a model's folder that decide what it computes.
_MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "*.py",
    "*.jinja",
    "*.model",
    "vocab.txt",
    "merges.txt",
)


def check_source(source: str) -> None:
    """Checks that `source` can be a model: a folder, or a name on the hub.

    Raises:
        ValueError: it is neither.
    """
    if os.path.isfile(source):
        raise ValueError(f"{source} is a file; give the folder it is in (for a GGUF file, and --gguf-file).")
    if not os.path.isdir(source) and not _HUB_NAME.fullmatch(source):
        raise ValueError(f"There is no folder {source}, and it is no name of a model on the hub either.")


def known_options(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the loading options that a model in memory tells: that its repository's code may run, if it does."""
    return {"trust_remote_code": True} if type(model).__module__.startswith("transformers_modules.") else {}


def heard_options(model: PreTrainedModel, files: list[str] | None) -> dict[str, Any]:
    """Returns a dict that will hold the loading options once `from_pretrained` has loaded the weights of `model`.

    A quantizer is not told them, but where the files are. The last thing that `from_pretrained` does before it lets a
    quantizer work is to load the generation config, if the model can write, with all options.

    Args:
        model: being loaded.
        files: of its weights.
    """
    options = known_options(model) | _options_of(files or [], model.name_or_path)
    adjust = getattr(model, "adjust_generation_fn", None)
    if adjust is None:
        return options

    def listen(*args: Any, **given: Any) -> None:
        del model.adjust_generation_fn
        options.update({name: given[name] for name in (*_GENERAL, *OF_THE_MODEL) if given.get(name)})
        adjust(*args, **given)

    model.adjust_generation_fn = listen
    return options


def _options_of(files: list[str], name: str) -> dict[str, Any]:
    """Returns the loading options that tell where the files of the model `name` were found."""
    if not files:
        return {}
    found = _CACHED.fullmatch(Path(files[0]).as_posix())
    if os.path.isdir(name):
        folder = os.path.relpath(os.path.dirname(files[0]), name)
        options = {"subfolder": "" if folder.startswith(".") else folder}
    else:
        options = found.groupdict() if found else {}
    return {key: value for key, value in options.items() if value}


def load_tokenizer(name: str | os.PathLike, model_name: str, options: dict[str, Any]) -> Any:
    """Returns the tokenizer at `name`.

    Args:
        name: folder or hub id.
        model_name: that of the model.
        options: loading options of the model; another repository has a revision and folders of its own.

    Raises:
        OSError, ValueError, KeyError: there is none, or transformers cannot load it.
    """
    names = _GENERAL if os.fspath(name) != model_name else (*_GENERAL, *OF_THE_MODEL)
    return AutoTokenizer.from_pretrained(name, **{key: value for key, value in options.items() if key in names})


def source_hash(source: str, gguf_file: str | None = None, options: dict[str, Any] | None = None) -> str | None:
    """Returns what changes when the files of a model do, None if it cannot be told.

    Args:
        source: folder, all of whose files are read, or hub id, of which the commit is.
        gguf_file: as for `load_dense`.
        options: loading options.
    """
    options = {key: value for key, value in (options or {}).items() if key != "trust_remote_code"}
    if not os.path.isdir(source):
        try:
            return extract_commit_hash(cached_file(source, gguf_file or "config.json", **options), None)
        except OSError:  # no network, say
            return None
    folder = Path(source, options.get("subfolder", ""))
    patterns = _MODEL_FILES if gguf_file is None else (glob.escape(gguf_file),)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return hashlib.sha256(repr([(file.name, file_hash(file)) for file in files]).encode()).hexdigest()


def file_hash(file: str | os.PathLike) -> str:
    """Returns the sha256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def load_dense(
    source: str, gguf_file: str | None = None, options: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, Any]:
    """Returns a dense model on the CPU, in the dtype it is stored in, and its tokenizer, None if it has none.

    The blocks of a model that is large beside the free memory are absent, see `blocks.absent`; those of a GGUF file
    are not. In place of the tokenizer it is the processor, where a model that also reads something else than text has
    one.

    Args:
        source: folder or hub id.
        gguf_file: name of a GGUF file in it; its weights become bfloat16.
        options: loading options.

    Raises:
        ValueError: the checkpoint is an adapter, already quantized, or no model that transformers knows.
        OSError: there is no such model.
    """
    options = options or {}
    if gguf_file is not None:
        return load_gguf(source, gguf_file, torch.bfloat16, options)
    config = _dense_config(source, options)
    kind = _class_of(config)
    model, problem = load_if_large(kind, source, config, options), None
    model = kind.from_pretrained(source, dtype="auto", **options) if model is None else model
    for reader in (AutoTokenizer,) if kind is AutoModelForCausalLM else (AutoProcessor, AutoTokenizer):
        try:
            return model, reader.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            problem = problem or error
    logger.warning("%s has no tokenizer that transformers can load: %s", source, problem)
    return model, None


def empty_dense(source: str, options: dict[str, Any] | None = None) -> PreTrainedModel:
    """Returns a dense model on the meta device: its shapes alone, of which only the config is read.

    Args:
        source: folder or hub id.
        options: loading options.

    Raises:
        ValueError, OSError: as `load_dense`.
    """
    check_source(source)
    options = options or {}
    config = _dense_config(source, options)
    return empty_model(_class_of(config), config, config.dtype or torch.float32, options)


def _dense_config(source: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Returns the config of a dense model.

    Raises:
        ValueError, OSError: as `load_dense`.
    """
    where = {key: value for key, value in options.items() if key != "trust_remote_code"}
    if find_adapter_config_file(source, **where) is not None:
        raise ValueError(
            f"{source} is a PEFT adapter; merge it into its base model first (model.merge_and_unload(), then "
            "save_pretrained), and give that folder."
        )
    config = AutoConfig.from_pretrained(source, **options)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ValueError(f"{source} is already quantized ({method}); start from the dense model.")
    return config


def _check_causal(source: str, options: dict[str, Any]) -> None:
    """Raises ValueError if a model is an encoder with a decoder: alone, that would write about nothing."""
    kind = _class_of(config := AutoConfig.from_pretrained(source, **options))
    if config.is_encoder_decoder and kind is not AutoModelForCausalLM:
        raise ValueError(
            f"{source} is a {kind.__name__}, whose decoder writes about what its encoder reads; crvq runs decoders on "
            f"text alone, so load it in Python: transformers.{kind.__name__}.from_pretrained({source!r})."
        )


def _class_of(config: PreTrainedConfig) -> Any:
    """Returns what loads a model with its head: its own class where it is an encoder-decoder, or writes no text."""
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    own = getattr(transformers, (config.architectures or [""])[0], None)
    if own is None or (is_causal and not config.is_encoder_decoder):
        return AutoModelForCausalLM
    return own


def load(
    source: str,
    device: str | None = None,
    dtype: str | None = None,
    gguf_file: str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Returns a model, dense or quantized, and its tokenizer, ready to run.

    Args:
        source: folder or hub id.
        device: to run on; cuda if present, else cpu.
        dtype: name of the dtype of what is not quantized, "auto" as stored; by default float32 on a CPU, else "auto".
        gguf_file: name of a GGUF file in `source` to read instead.
        options: loading options.

    Raises:
        ValueError, OSError: there is no such model or device, or no tokenizer beside it, or it is no decoder.
    """
    check_source(source)
    options = options or {}
    place = compute_device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "auto")
    if gguf_file is not None:
        model, tokenizer = load_dense(source, gguf_file, options)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (ValueError, KeyError) as error:  # what transformers says of a folder without one is of its libraries
            raise ValueError(
                f"{source} has no tokenizer that transformers can load; put that of the model it was made of beside "
                f"it: AutoTokenizer.from_pretrained(BASE).save_pretrained({source!r})."
            ) from error
        _check_causal(source, options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model.to(place).eval(), tokenizer
