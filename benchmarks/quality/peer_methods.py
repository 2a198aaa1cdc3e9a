"""The quantizers that `peers` compares with, each through its own package, as its own documentation uses it.

A method takes the folder of a dense model and returns what its layers became: weights that can be evaluated, and the
bytes that a checkpoint must keep for them, counted from the tensors or the file the package makes. Packages are
imported by the method that needs them.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantoConfig

from crvq_hf import CRVQConfig
from crvq_hf.calibration.tokens import calibration_tokens
from crvq_hf.modeling.replace import quantizable_linears

NSAMPLES, SEQLEN = 64, 512
MOST_BLOCKS = 1000


@dataclass
class Work:
    """What the methods share.

    Attributes:
        model: folder of the dense model.
        text: file of calibration text.
        folder: for files that are made once and used by several methods, and for checkpoints.
    """

    model: str
    text: str
    folder: Path

    def dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns the dense model."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()

    def tokens(self, model: nn.Module) -> Tensor:
        """Returns the calibration tokens, `[NSAMPLES, SEQLEN]`: those `crvq quantize` takes first from the text."""
        config = CRVQConfig(dataset=self.text, nsamples=NSAMPLES, seqlen=SEQLEN, e2e_finetune_epochs=0)
        return calibration_tokens(model, AutoTokenizer.from_pretrained(self.model), config)


@dataclass
class Result:
    """What a method made of the linear layers.

    Attributes:
        weights: the dequantized weight of every quantized layer by its name, `[N, K]`.
        stored_bytes: what a checkpoint must keep for them.
        note: what should stand beside the numbers.
        earlier_seconds: CPU seconds of work that another row's run did for this one as well.
    """

    weights: dict[str, Tensor]
    stored_bytes: int
    note: str = ""
    earlier_seconds: float = 0.0


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that are quantized, by name: those that `crvq quantize` takes as well."""
    return quantizable_linears(model, CRVQConfig())[0]


def hqq(work: Work, bits: int, group: int) -> Result:
    """HQQ: half-quadratic quantization, without calibration.

    transformers 5.23 has no `HqqConfig` that works ("not available yet and will be supported soon"), so the layers are
    made as it made them, by `HQQLinear` along axis 1. Scales and zero points are in fp16. Groups that do not fit a row
    run over its end.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    weights, stored = {}, 0
    for name, layer in block_linears(work.dense(torch.float16)).items():
        quantized = HQQLinear(layer, dict(config), compute_dtype=torch.float16, device="cpu")
        weights[name] = quantized.dequantize().float()
        stored += sum(part.nbytes for part in (quantized.W_q, quantized.meta["scale"], quantized.meta["zero"]))
    return Result(weights, stored, "hqq's own HQQLinear, axis 1, scales and zero points in fp16")


def quanto(work: Work, bits: int) -> Result:
    """optimum-quanto through transformers, without calibration. Scales and shifts are in fp16."""
    model = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.float16, quantization_config=QuantoConfig(weights=f"int{bits}")
    )
    weights, stored = {}, 0
    for name in block_linears(work.dense()):
        layer = model.get_submodule(name)
        weights[name] = layer.weight.dequantize().float()
        stored += sum(tensor.nbytes for key, tensor in layer.state_dict().items() if key.startswith("weight."))
    return Result(weights, stored, "transformers' QuantoConfig, scales and shifts in fp16")


def gptq(work: Work, bits: int, group: int) -> Result:
    """GPTQ by GPTQModel, its defaults otherwise (symmetric, channels in groups reordered by activations)."""
    from gptqmodel import GPTQModel, QuantizeConfig

    out = work.folder / f"gptq-{bits}-{group}"
    model = GPTQModel.load(work.model, QuantizeConfig(bits=bits, group_size=group, device="cpu"))
    tokens = work.tokens(model.model)
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens[:, None]])
    model.save(str(out))
    return _read_gptq(out, work, "GPTQModel's defaults")


def auto_round(work: Work, bits: int, group: int, iters: int, batch: int) -> Result:
    """AutoRound: rounding learned block by block. Fewer and smaller steps than its default of 200 of 8 sequences."""
    from auto_round import AutoRound

    out = work.folder / f"auto_round-{bits}-{group}"
    model, tokenizer = work.dense(), AutoTokenizer.from_pretrained(work.model)
    recipe = AutoRound(
        model,
        tokenizer,
        scheme={"data_type": "int", "bits": bits, "group_size": group, "sym": True},
        dataset=list(work.tokens(model).split(batch)),
        iters=iters,
        nsamples=NSAMPLES,
        seqlen=SEQLEN,
        batch_size=batch,
        device_map="cpu",
        enable_torch_compile=False,
    )
    folder = recipe.quantize_and_save(str(out), format="auto_gptq")[1]
    folder = folder[0] if isinstance(folder, list | tuple) else folder
    return _read_gptq(Path(folder), work, f"symmetric, {iters} steps of {batch} sequences (default 200 of 8)")


def _read_gptq(folder: Path, work: Work, note: str) -> Result:
    """Returns what is in a checkpoint of the GPTQ format, dequantized by GPTQModel.

    Its files hold the number of the group of every channel. Where that only counts up it is not needed, nor counted.
    """
    from gptqmodel import BACKEND, GPTQModel
    from safetensors import safe_open

    names = list(block_linears(work.dense()))
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name, _, part = key.rpartition(".")
                tensor = file.get_tensor(key)
                counts_up = part == "g_idx" and bool((tensor.diff() >= 0).all())
                stored += 0 if name not in names or part == "bias" or counts_up else tensor.nbytes
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu").model
    weights = {name: model.get_submodule(name).dequantize_weight().T.float().contiguous() for name in names}
    return Result(weights, stored, note)


def llama_cpp(work: Work, kind: str) -> Result:
    """A GGUF file by llama.cpp's `llama_model_quantize` with an importance matrix; embeddings stay in fp32.

    Layers whose rows are no multiple of 256 get other types, of llama.cpp's choice; the note says which there are.
    """
    import gguf
    import llama_cpp as lib

    source, importance, seconds = _gguf_source(work)
    out = work.folder / f"{kind}.gguf"
    parameters = lib.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.token_embedding_type = parameters.output_tensor_type = int(gguf.GGMLQuantizationType.F32)
    parameters.imatrix = _imatrix(lib.llama_model_imatrix_data, importance)
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp did not quantize to {kind}.")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    weights, stored, types = {}, 0, {}
    for name in block_linears(work.dense()):
        tensor = tensors[_gguf_name(f"{name}.weight")]
        weights[name] = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        stored += int(tensor.n_bytes)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + weights[name].numel()
    out.unlink()
    total = sum(types.values())
    shares = ", ".join(f"{n / total:.0%} {key}" for key, n in sorted(types.items(), key=lambda item: -item[1]))
    return Result(weights, stored, f"importance matrix; weights are {shares}", seconds)


def _gguf_name(parameter: str) -> str:
    """Returns what a parameter of a Llama model is called in a GGUF file."""
    return _gguf_names().get_name(parameter, try_suffixes=(".weight",))


@functools.cache
def _gguf_names() -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, MOST_BLOCKS)


def _gguf_source(work: Work) -> tuple[Path, dict[str, Tensor], float]:
    """Returns an fp32 GGUF of the model, the mean square of every layer's input channels, and CPU seconds of both.

    The file is for quantizing only: it has no tokenizer, and rows of q and k are not in llama.cpp's order, which
    changes nothing: rows are quantized one by one.
    """
    import gguf

    path, measured = work.folder / "fp32.gguf", work.folder / "importance.pt"
    if measured.exists():
        return path, *torch.load(measured)
    start = time.process_time()
    model = work.dense()
    importance = _mean_squares(model, work.tokens(model))
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    for name, tensor in model.named_parameters():  # of tied ones the first: the embedding
        writer.add_tensor(_gguf_name(name), tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seconds = time.process_time() - start
    torch.save((importance, seconds), measured)
    return path, importance, 0.0  # they are this process's own


@torch.no_grad()
def _mean_squares(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the mean square of every input channel by the GGUF name of the layer, `[K]`, fp32."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            square = inputs[0].flatten(0, -2).square().mean(0)
            sums[name] = sums.get(name, torch.zeros_like(square)) + square / len(tokens)

        return hook

    layers = block_linears(model).items()
    hooks = [layer.register_forward_pre_hook(add(_gguf_name(f"{name}.weight"))) for name, layer in layers]
    for row in tokens:
        model.model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


def _imatrix(entry: type[ctypes.Structure], importance: dict[str, Tensor]) -> ctypes.Array:
    """Returns an array of llama.cpp's entries, the last one without a name; `importance` must outlive it."""
    entries = (entry * (len(importance) + 1))()
    for place, (name, values) in zip(entries, importance.items(), strict=False):
        place.name, place.size = name.encode(), values.numel()
        place.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
    return entries
