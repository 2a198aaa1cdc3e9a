"""Quantized models for the tests of the report and of the hub, made without quantizing much."""

import json
from pathlib import Path

from tiny import random_weight, save_tiny, tiny_tokenizer

from crvq_hf import CRVQConfig
from crvq_hf.commands.convert import convert
from crvq_hf.modeling.replace import linear_size, quantizable_linears, set_quantized_
from crvq_hf.quantizer import CRVQQuantizer

SETTINGS = {"nsamples": 2, "seqlen": 16, "nbits_per_codebook": 4, "e2e_finetune_epochs": 0}


def make_quantized(folder: Path) -> tuple[Path, Path]:
    """Returns the folders of a tiny dense model and of what `convert` made of it."""
    dense = save_tiny(folder / "private" / "tiny-model")
    config = CRVQConfig(dataset=str(dense / "text.txt"), **SETTINGS)
    convert(str(dense), folder / "out", config)
    return dense, folder / "out"


def save_random(folder: Path, model, error=lambda block, index: 0.05) -> Path:
    """Saves `model` with random codes in place of all its linears, and a report with made-up errors.

    Args:
        folder: to make.
        model: a dense model, changed.
        error: relative error of layer `index` of block `block`.
    """
    config = CRVQConfig(dataset=None)
    linears, _ = quantizable_linears(model, config)
    for name, dense in linears.items():
        set_quantized_(model, name, random_weight(config.of_layer(name).layer_shape(*linear_size(dense))))
    CRVQQuantizer(config, pre_quantized=True).attach(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    layers = {name: model.get_submodule(name) for name in linears}
    bits = sum(8 * layer.quantized_weight().nbytes for layer in layers.values())
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    blocks = {name: int(next(part for part in name.split(".") if part.isdigit())) for name in layers}
    report = {
        "bits_per_weight": bits / weights,
        "layers": {
            name: {"relative_error": error(blocks[name], index), "bits_per_weight": 1.0, "seconds": 0.1}
            for index, name in enumerate(layers)
        },
        "seconds": {"calibration": 1.0, "quantizing": 20.0, "block fine-tuning": 300.0},
        "calibration_tokens": 4096,
        "activation_bytes": 10**6,
        "peak_memory_bytes": 10**9,
        "e2e_loss": None,
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
