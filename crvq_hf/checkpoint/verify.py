"""Whether a checkpoint on disk is still what was saved: hashes, headers, shapes, channel orders, scales."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import QUANT_METHOD, CRVQConfig
from ..modeling.table import ROW_SCALE, TABLE_NAMES, Table
from ..quantized_weight import TENSOR_NAMES, QuantizedWeight
from .headers import (
    TensorInfo,
    check_embeddings,
    check_layer,
    embedding_modules,
    files_of_folder,
    layer_sizes,
    quantized_modules,
    read_headers,
    read_index,
    read_metadata,
)
from .metadata import CONFIG_HASH_KEY, HASHES_KEY, VERSION_KEY, json_hash, tensor_hash


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        problems: one sentence each; none if all is well.
        num_tensors: how many tensors the checkpoint has.
        num_hashes: how many of them were compared with the hash that was saved with them.
        has_config_hash: whether config.json was compared too.
    """

    problems: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_hashes: int = 0
    has_config_hash: bool = False

    @property
    def summary(self) -> str:
        """One line for a checkpoint without problems."""
        if self.num_hashes == 0:
            return (
                f"{self.num_tensors} tensors, well-formed. They carry no hashes (saved by a crvq_hf without them, or "
                "from an offloaded model), so changed numbers cannot be seen; save the model again to add hashes."
            )
        config = ", config.json too" if self.has_config_hash else ""
        return f"{self.num_tensors} tensors, all as they were saved (sha256){config}."


def verify(source: str | os.PathLike) -> Verification:
    """Checks every tensor of a CRVQ checkpoint in a folder against hash, header, config and sense.

    Raises:
        ValueError: `source` is no folder.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"{source} is no folder; give the folder of a quantized model.")
    found = Verification()
    try:
        text = _read_text(folder / "config.json")
        config = _crvq_config(text, folder)
        files = files_of_folder(folder)
        tensors = read_headers(files)
        metadata = {file: read_metadata(file) for file in files}
    except ValueError as error:  # too little is left to look further
        found.problems.append(str(error))
        return found
    found.num_tensors = len(tensors)
    found.has_config_hash = CONFIG_HASH_KEY in metadata[files[0]]
    found.problems += _index_problems(folder, tensors)
    for file in files:
        found.problems += _metadata_problems(file.name, metadata[file], metadata[files[0]], text, config)
    found.problems += _structure_problems(tensors, config)
    hashes = _hashes(files[0].name, metadata[files[0]], found)
    found.problems += _lost(hashes, tensors)
    for file in files:
        found.problems += _content_problems(file, hashes, found)
    if not found.problems:
        found.problems += _layer_problems(files, tensors, config)
    return found


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is damaged: it is no UTF-8 text; download or save it again.") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); the checkpoint is incomplete.") from error


def _crvq_config(text: str, folder: Path) -> CRVQConfig:
    """Returns the CRVQ config in the text of a config.json.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        stored = json.loads(text).get("quantization_config")
        method = stored and stored.get("quant_method")
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{folder / 'config.json'} is damaged: it is no JSON object; download it again.") from None
    if method != QUANT_METHOD:
        raise ValueError(f"{folder} is no CRVQ checkpoint: its config.json names the quantization {method!r}.")
    return CRVQConfig.from_dict(stored)


def _index_problems(folder: Path, tensors: dict[str, TensorInfo]) -> list[str]:
    """Returns what the index of a sharded checkpoint says wrongly about where tensors are."""
    index = read_index(folder) or {name: Path(info.file).name for name, info in tensors.items()}
    actual = {name: Path(info.file).name for name, info in tensors.items()}
    return [
        f"{name}: the index says that it is in {index.get(name)}, it is in {actual.get(name)}."
        for name in sorted({*index, *actual})
        if index.get(name) != actual.get(name)
    ]


def _metadata_problems(
    name: str, metadata: dict[str, str], first: dict[str, str], text: str, config: CRVQConfig
) -> list[str]:
    """Returns what the metadata of one file says against config.json and the first file."""
    problems = []
    version = metadata.get(VERSION_KEY)
    if version not in (None, str(config.format_version)):
        problems.append(f"{name} has format version {version}, config.json {config.format_version}.")
    saved = metadata.get(CONFIG_HASH_KEY)
    if saved not in (None, json_hash(text)):
        problems.append(f"config.json is not the one that was saved with {name} (sha256 differs).")
    if metadata.get(HASHES_KEY) != first.get(HASHES_KEY):
        problems.append(f"{name} was not saved together with the other files: its table of hashes differs.")
    return problems


def _structure_problems(tensors: dict[str, TensorInfo], config: CRVQConfig) -> list[str]:
    """Returns what headers and config say against each other."""
    modules = quantized_modules(tensors)
    problems = [] if modules else ["None of the tensors belongs to a CRVQ layer."]
    checks = [lambda: check_embeddings(tensors, config)]
    for module in modules:
        checks.append(lambda module=module: _check_layer(tensors, module, config))
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _check_layer(tensors: dict[str, TensorInfo], module: str, config: CRVQConfig) -> None:
    """Raises ValueError if the tensors of one layer do not fit together."""
    names = [f"{module}.{name}" for name in (*TENSOR_NAMES, "bias")]
    own = {name: tensors[name] for name in names if name in tensors}
    size = layer_sizes(own)[module]
    check_layer(own, module, config, size.in_features, size.out_features, f"{module}.bias" in own)


def _hashes(name: str, metadata: dict[str, str], found: Verification) -> dict[str, str]:
    """Returns the hashes by name that were saved, none if there are none."""
    try:
        hashes = json.loads(metadata.get(HASHES_KEY, "{}"))
        if isinstance(hashes, dict):
            return hashes
    except (ValueError, RecursionError):
        pass
    found.problems.append(f"{name}: its table of hashes is damaged.")
    return {}


def _lost(hashes: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    """Returns which tensors have a hash and are not there, or the other way round."""
    problems = [f"{name} was saved, but is missing." for name in hashes if name not in tensors]
    if hashes:
        problems += [
            f"{name} was not saved with the others: it has no hash." for name in tensors if name not in hashes
        ]
    return problems


def _content_problems(file: Path, hashes: dict[str, str], found: Verification) -> list[str]:
    """Returns which tensors of a file have changed since they were saved; counts those compared."""
    problems = []
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                if name in hashes:
                    found.num_hashes += 1
                    if tensor_hash(opened.get_tensor(name)) != hashes[name]:
                        problems.append(f"{name} in {file.name} has changed since it was saved (sha256 differs).")
    except (SafetensorError, OSError, RuntimeError, TypeError, KeyError) as error:
        problems.append(f"{file.name} is damaged: {' '.join(str(error).split())}.")
    return problems


def _layer_problems(files: list[Path], tensors: dict[str, TensorInfo], config: CRVQConfig) -> list[str]:
    """Returns what is wrong with the values of quantized layers: order, codes, codebooks, scales."""
    problems = []
    opened = {str(file): safe_open(file, "pt") for file in files}

    def tensor(name):
        return opened[tensors[name].file].get_tensor(name)

    for module in quantized_modules(tensors):
        weight = {name: tensor(f"{module}.{name}") for name in TENSOR_NAMES}
        shape = config.of_layer(module).layer_shape(len(weight["weight_order"]), len(weight["weight_scale"]))
        try:
            QuantizedWeight.from_tensors(weight, shape.nbits, shape.num_critical_groups).check(module)
        except ValueError as error:
            problems.append(str(error))
    for module in embedding_modules(tensors):
        if config.has_coded_embeddings:
            try:
                Table.from_tensors({name: tensor(f"{module}.{name}") for name in TABLE_NAMES}).check(module)
            except ValueError as error:
                problems.append(str(error))
        elif not tensor(f"{module}.{ROW_SCALE}").isfinite().all():
            problems.append(f"{module}.{ROW_SCALE} holds NaN or infinite values; the checkpoint is damaged.")
    return problems
