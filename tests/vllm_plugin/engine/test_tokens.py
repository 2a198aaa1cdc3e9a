"""vLLM writes the greedy tokens of transformers, with and without compilation."""

import gc
import json
import shutil

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed; `make test-vllm` runs this")

import torch
from checkpoints import (
    IMAGE_TOKEN,
    MODELS,
    PROMPTS,
    TEXTS,
    TOKENS,
    largest_lag,
    transformers_writes,
    transformers_writes_of_image,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

pytestmark = pytest.mark.timeout(900)
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)


@pytest.fixture
def engine(monkeypatch):
    """Returns a function (folder, **options) -> engine in this process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engines = []

    def start(folder, **options):
        engines.append(LLM(str(folder), **{"dtype": "float32", "enforce_eager": True, "max_model_len": 128} | options))
        return engines[-1]

    yield start
    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def writes(llm, prompts, **options):
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "partly-dense"])
def test_eager(engine, made, name):
    folder = made(name)
    assert writes(engine(folder), PROMPTS) == transformers_writes(folder, torch.float32, PROMPTS)


@pytest.mark.parametrize("name", ["biases", "rows", "gemma3", "qwen2", "mixtral"])
def test_compiled(engine, made, name):
    folder = made(name)
    assert writes(engine(folder, enforce_eager=False), PROMPTS) == transformers_writes(folder, torch.float32, PROMPTS)


def test_images(engine, made):
    folder = made("llava")
    image = Image.linear_gradient("L").convert("RGB").resize((28, 28))
    prompt = [7, 30, IMAGE_TOKEN, 12, 99]
    llm = engine(folder, limit_mm_per_prompt={"image": 1})
    output = llm.generate([{"prompt_token_ids": prompt, "multi_modal_data": {"image": image}}], GREEDY, use_tqdm=False)
    assert list(output[0].outputs[0].token_ids) == transformers_writes_of_image(folder, image, prompt)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_smollm2(engine, smollm2, compiled):
    llm = engine(smollm2, enforce_eager=not compiled)
    prompts = [llm.get_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert writes(llm, prompts) == transformers_writes(smollm2, torch.float32, prompts)


def test_smollm2_in_bfloat16(engine, smollm2):
    """Two programs round differently; the tokens must be the likeliest but for rounding, here 1/8 a logit."""
    llm = engine(smollm2, dtype="bfloat16")
    prompts = [llm.get_tokenizer()(text)["input_ids"] for text in TEXTS]
    written = writes(llm, prompts)
    expected = transformers_writes(smollm2, torch.bfloat16, prompts)
    equal = sum(own[:16] == other[:16] for own, other in zip(written, expected, strict=True))
    lag, others = (largest_lag(smollm2, prompts, tokens) for tokens in (written, expected))
    print(f"first 16 tokens equal: {equal} of 16; lag {lag:.3f}, of transformers {others:.3f}")
    assert lag < max(0.5, 1.5 * others)


def test_a_fused_layer_that_is_partly_dense(engine, made):
    with pytest.raises(Exception, match="q_proj is dense in the checkpoint and the others quantized; quantize again"):
        engine(made("partly-dense"))


def changed(folder, new, change):
    """Returns a copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(folder, new)
    tensors = load_file(new / "model.safetensors")
    change(tensors)
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return new


def test_a_tensor_is_missing(engine, made, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    folder = changed(made("rows"), tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(Exception, match=f"lacks the tensor {name}; it is incomplete"):
        engine(folder)


def test_a_scale_is_not_finite(engine, made, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    folder = changed(made("rows"), tmp_path / "model", lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(Exception, match="weight_scale holds NaN or infinite values; the checkpoint is damaged"):
        engine(folder)


def test_an_unknown_format(engine, made, tmp_path):
    folder = shutil.copytree(made("rows"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="The checkpoint has CRVQ format_version 9, this crvq_hf reads only"):
        engine(folder)


def test_experts_that_do_not_wait_for_data(engine, made, monkeypatch):
    """As in CUDA graphs: all experts run."""
    from crvq_hf.vllm import experts

    monkeypatch.setattr(experts, "_must_not_wait", lambda x: True)
    folder = made("mixtral")
    assert writes(engine(folder), PROMPTS) == transformers_writes(folder, torch.float32, PROMPTS)
