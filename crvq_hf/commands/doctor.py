"""What is here: versions, the code that runs a CRVQ layer and whether it computes the right thing, work folders."""

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from crvq_kernels import (
    channel_index,
    cpu,
    encode_codebooks,
    implementation,
    linear,
    linear_ref,
    pack_codes,
    prefers_int8_codebooks,
    prefers_tiles,
    tile_codes,
)

from ..pipeline import fingerprint
from ..resources.device import compute_device, has_fast_bfloat16
from ..resources.workfolder import FINGERPRINT, FINISHED, folder_bytes, remove_folder, state_of, work_folders
from ..sharing.text import megabytes

HELP = "versions, the kernel in use and whether it computes correctly, work folders of earlier runs"
PACKAGES = ("crvq-hf", "torch", "transformers", "triton", "accelerate", "optimum", "safetensors", "datasets", "gguf")
TOKEN_COUNTS = (1, 8, 64, 2048)  # writing one text, several, reading a short one, a long one
OUT_FEATURES, IN_FEATURES = 192, 256
TOLERANCE = 1e-2  # relative RMS error of fp16 activations


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--device", help="device to examine; cuda if present, else cpu")
    text = "remove the work folders of finished runs from the Hugging Face cache, and do nothing else"
    parser.add_argument("--clean", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if a kernel computes something else than the reference."""
    if args.clean:
        print("\n".join(clean(fingerprint.WORK_FOLDERS)))
        return 0
    lines, well = examine(compute_device(args.device))
    print("\n".join([*lines, *listed(fingerprint.WORK_FOLDERS)]))
    return 0 if well else 1


def listed(parent: Path) -> list[str]:
    """Returns lines on the work folders in `parent`, the folder of those that were not named."""
    folders = work_folders(parent)
    lines = [f"{megabytes(folder_bytes(folder))}, {state_of(folder)}: {folder}" for folder in folders]
    if any(", finished: " in line for line in lines):
        lines.append("crvq doctor --clean removes those that are finished")
    return [f"{'work folders' if not number else '':<18} {line}" for number, line in enumerate(lines or ["none"])]


def clean(parent: Path) -> list[str]:
    """Removes the finished work folders in `parent`; returns lines on what is gone and what is left."""
    lines = []
    for folder in work_folders(parent):
        size, state = megabytes(folder_bytes(folder)), state_of(folder)
        if state == FINISHED:
            remove_folder(folder, last=FINGERPRINT)
        lines.append(f"{'left' if folder.exists() else 'removed'}: {size}, {state}: {folder}")
    return lines or [f"There are no work folders in {parent}."]


def examine(device: torch.device) -> tuple[list[str], bool]:
    """Returns the lines that `crvq doctor` prints, and whether all is well.

    Args:
        device: where to run a layer.
    """
    lines = [f"{'python':<18} {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package:<18} {installed_version(package)}" for package in PACKAGES]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    lines.append(f"{'device':<18} {device} ({name}), {torch.get_num_threads()} threads")
    found = importlib.util.find_spec("triton") is not None
    lines.append(f"{'triton':<18} {'found' if found else 'not found'}; it runs on CUDA devices only")
    lines.append(f"{'cpu kernel':<18} {_cpu_kernel()}")
    lines.append(f"{'fast bfloat16':<18} {'yes' if has_fast_bfloat16(device.type) else 'no'}")
    well = True
    for count in TOKEN_COUNTS:
        error = _relative_error(device, count)
        agrees = error < TOLERANCE
        well = well and agrees
        verdict = "agrees with the reference" if agrees else "DIFFERS from the reference"
        lines.append(
            f"{f'for {count} token' + 's' * (count > 1):<18} {_path(device, count)}; "
            f"{verdict} (relative error {error:.1e})"
        )
    return lines, well


def _path(device: torch.device, num_tokens: int) -> str:
    """Names the code that runs a layer of `OUT_FEATURES` rows."""
    sizes, tiled = (num_tokens, OUT_FEATURES, IN_FEATURES, 256, 8, _dtype(device)), prefers_tiles(device)
    codebook_dtype = torch.int8 if prefers_int8_codebooks(device) else torch.float16
    return implementation(device, *sizes, tiled, codebook_dtype, num_codebooks=2)


def _dtype(device: torch.device) -> torch.dtype:
    """Returns the type of the activations that are tried."""
    return torch.float32 if device.type == "cpu" else torch.float16


def _cpu_kernel() -> str:
    """Returns which instruction set the compiled kernel uses, and why not a better one."""
    library, reason = cpu.library(), cpu.why_not_better()
    name = "none, PyTorch instead" if library is None else cpu.INSTRUCTIONS[library.level]
    return f"{name}: {reason}" if reason else name


def installed_version(package: str) -> str:
    """Returns the version of an installed package, or words that say it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _relative_error(device: torch.device, num_tokens: int) -> float:
    """Returns the relative RMS error of one random layer on `device` against the fp32 reference."""
    in_features, out_features, in_group_size, nbits, num_codebooks = IN_FEATURES, OUT_FEATURES, 8, 8, 2
    num_critical_groups = 2
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(in_features, generator=generator).to(torch.int16)
    num_codes = len(channel_index(order, in_group_size, num_codebooks, num_critical_groups)) // in_group_size
    codes = pack_codes(torch.randint(2**nbits, (out_features, num_codes), generator=generator), nbits)
    codebooks = encode_codebooks(torch.randn(num_codebooks, 2**nbits, in_group_size, generator=generator).clamp(-3, 3))
    scales = torch.rand(out_features, generator=generator).half()
    x = torch.randn(num_tokens, in_features, generator=generator)
    expected = linear_ref(x, codes, codebooks, scales, order, None, nbits, num_critical_groups)
    codes = tile_codes(codes, nbits, num_codes) if prefers_tiles(device) else codes
    layer = [tensor.to(device) for tensor in (codes, codebooks, scales, order)]
    got = linear(x.to(device, _dtype(device)), *layer, None, nbits, num_critical_groups).float().cpu()
    return float((got - expected).norm() / expected.norm())
