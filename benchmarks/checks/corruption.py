"""Damages copies of a tiny checkpoint; none may load as another model that `crvq verify` passes.

    python -m benchmarks corruption --copies 1000 --seed 0

Each copy ends in one of four ways: loading refuses it with a message, loading gives the very same tensors and config,
loading gives something else (or dies unclearly) but `crvq verify` says so, or none of these: a wrong model.
"""

import json
import os
import random
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

from crvq_hf import CRVQConfig, quantize_model  # noqa: E402
from crvq_hf.checkpoint.verify import verify  # noqa: E402

from ..common.commands import command_line, from_tests  # noqa: E402
from ..common.rows import aligned  # noqa: E402

KINDS = ("whole", "sharded", "coded")  # of checkpoints that are damaged
SECONDS = 60  # a load or check that takes longer hangs
# Errors that tell a user what is wrong. Others, a KeyError inside transformers say, count only if `verify` is clear.
CLEAR = (ValueError, OSError, RuntimeError, SafetensorError)
UNCLEAR = (json.JSONDecodeError, UnicodeError)  # ValueErrors, but they do not say of which file


def save_models(folder: Path) -> dict[str, Path]:
    """Saves a checkpoint in one file, in shards one with 8-bit and one with 2.5-bit embeddings, and another of 8.

    That with 2.5 has settings of some layers too.
    """
    folders, tiny_model = {}, from_tests("tiny").tiny_model
    overrides = {"layers.0": {"in_group_size": 4, "critical_ratio": 1.0}}
    for name, seed, bits in (("whole", 0, 16), ("sharded", 0, 8), ("coded", 0, 2.5), ("other", 1, 8)):
        config = CRVQConfig(dataset=None, embedding_bits=bits, seed=seed, work_dir=folder / f"{name}.work")
        config.overrides = overrides if name == "coded" else None
        model = quantize_model(tiny_model(tie_word_embeddings=bits <= 8), config=config)
        folders[name] = folder / name
        model.save_pretrained(folders[name], max_shard_size="1GB" if name == "whole" else "16KB")
    return folders


# Ways of damage: each changes a folder at random.


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(file: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _flip(file: Path, rng: random.Random, low: int, high: int, bits: int) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(bits):
        content[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def flip_data(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    file = rng.choice(_shards(folder))
    size = file.stat().st_size
    _flip(file, rng, size - len(_header(file)[1]), size, rng.choice((1, 1, 5)))


def flip_header(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    file = rng.choice(_shards(folder))
    _flip(file, rng, 0, file.stat().st_size - len(_header(file)[1]), rng.choice((1, 1, 5)))


def flip_json(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    names = [name for name in ("config.json", "model.safetensors.index.json") if (folder / name).exists()]
    file = folder / rng.choice(names)
    _flip(file, rng, 0, file.stat().st_size, rng.choice((1, 1, 2)))


def truncate(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    file = rng.choice([*_shards(folder), *folder.glob("*.json")])
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def zero_range(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    file = rng.choice([*_shards(folder), *_shards(folder), *folder.glob("*.json")])
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 16, 512, 4096)))
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


def swap_files(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    """Two shards for each other, or one for that of another model."""
    shards = _shards(folder)
    if len(shards) > 1 and rng.random() < 0.5:
        first, second = rng.sample(shards, 2)
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        return
    file = rng.choice(shards)
    shutil.copy(rng.choice(_shards(folders["other"])), file)


def edit_header(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    """Shapes, dtypes, names or places in a header, consistent with the size of the file."""
    file = rng.choice(_shards(folder))
    header, data = _header(file)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(("transpose", "number", "dtype", "names", "places", "metadata"))
    if kind == "transpose":
        header[name]["shape"] = header[name]["shape"][::-1] + [1] * rng.choice((0, 1))
    elif kind == "number":
        shape = header[name]["shape"]
        shape[rng.randrange(len(shape))] += rng.choice((-1, 1, 2**40))
    elif kind == "dtype":
        same_size = {"F16": ("BF16", "I16"), "U8": ("I8", "BOOL"), "I8": ("U8",), "F32": ("I32",)}
        header[name]["dtype"] = rng.choice(same_size.get(header[name]["dtype"], ("F64",)))
    elif kind == "names":
        header[name], header[other] = header[other], header[name]
    elif kind == "places":
        places = header[name]["data_offsets"], header[other]["data_offsets"]
        header[other]["data_offsets"], header[name]["data_offsets"] = places
    else:
        header.setdefault("__metadata__", {}).pop(rng.choice(list(header["__metadata__"])))
    _write(file, header, data)


def edit_config(folder: Path, rng: random.Random, folders: dict[str, Path]) -> None:
    """One value of config.json, of the same type."""
    config = json.loads((folder / "config.json").read_text())
    place = rng.choice([config, config["quantization_config"]])
    name = rng.choice([name for name, value in place.items() if not isinstance(value, dict)])
    value = place[name]
    if isinstance(value, bool):
        place[name] = not value
    elif isinstance(value, (int, float)):
        place[name] = rng.choice((value * 2, value + 1, value - 1, 0))
    elif rng.random() < 0.5:
        place[name] = None
    else:
        del place[name]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


WAYS: list[Callable] = [
    flip_data, flip_header, flip_json, truncate, zero_range, swap_files, edit_header, edit_config
]  # fmt: skip


# Outcomes


def load(folder: Path) -> tuple[str, dict[str, tuple]]:
    """Returns the config, as JSON, of a checkpoint, and of its tensors dtype, shape and bytes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    stored = {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }
    return json.dumps(config, sort_keys=True, default=str), stored


def outcome(folder: Path, expected: tuple) -> tuple[str, str]:
    """Returns what became of a damaged folder, and the message."""
    try:
        found = load(folder)
        message = "loaded"
    except Exception as error:
        found, message = None, f"{type(error).__name__}: {error}"
        if isinstance(error, CLEAR) and not isinstance(error, UNCLEAR):
            return "refused at load", message
    if found == expected:
        return "harmless", message
    problems = verify(folder).problems
    if problems:
        return "caught by verify", problems[0]
    return "WRONG", message


def too_long(*_: object) -> None:
    # Not an `Exception`, so that nothing takes it for a refusal.
    raise SystemExit(f"no end after {SECONDS} s")


def main(arguments: list[str]) -> int:
    """Damages copies; returns 1 if one of them is a wrong model."""
    parser = command_line(__name__, writes=False)
    parser.add_argument("--copies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each outcome")
    args = parser.parse_args(arguments)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, too_long)
    counts: dict[str, Counter] = {way.__name__: Counter() for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folders = save_models(Path(name))
        expected = {kind: load(folders[kind]) for kind in KINDS}
        for kind in expected:
            if verify(folders[kind]).problems or load(folders[kind]) != expected[kind]:
                raise SystemExit("An undamaged checkpoint is not found whole.")
        for number in range(args.copies):
            rng = random.Random(f"{args.seed}:{number}")
            kind, way = KINDS[number % len(KINDS)], WAYS[number // len(KINDS) % len(WAYS)]
            copy = shutil.copytree(folders[kind], Path(name) / "copy")
            way(copy, rng, folders)
            signal.alarm(SECONDS)
            result, message = outcome(copy, expected[kind])
            signal.alarm(0)
            counts[way.__name__][result] += 1
            if result == "WRONG" or args.verbose:
                print(f"{number} {kind} {way.__name__}: {result}: {' '.join(message.split())[:200]}", flush=True)
            shutil.rmtree(copy)
    total = sum(counts.values(), Counter())
    results = ["refused at load", "caught by verify", "harmless", "WRONG"]
    lines = [[way, *(str(found[title]) for title in results)] for way, found in (counts | {"all": total}).items()]
    print(aligned([["damage", *results], *lines]))
    print(f"{total['WRONG']} of {args.copies} wrong models (seed {args.seed})")
    return 1 if total["WRONG"] else 0
