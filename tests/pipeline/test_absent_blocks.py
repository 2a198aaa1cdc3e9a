"""A model larger than memory: its blocks are read one at a time, and what comes out has the bits of one in memory."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import random_models
import torch
import whole_models
from tiny import TEXT, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.blocks import absent
from crvq_hf.checkpoint import blockwise
from crvq_hf.checkpoint.sources import load_dense
from crvq_hf.modeling.linear import CRVQLinear
from crvq_hf.modeling.replace import is_dense_linear
from crvq_hf.pipeline import block_loop

FIELDS = whole_models.FIELDS | whole_models.OFF | {"dataset": [TEXT], "nsamples": 4, "seqlen": 8}
TUNING = {"block_finetune_epochs": 1, "e2e_finetune_epochs": 1, "e2e_nsamples": 6}
STACKED = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
STACKED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def large(monkeypatch):
    """Takes every model for one that does not fit in memory."""
    monkeypatch.setattr(blockwise, "MEMORY_SHARE", 0)


@pytest.fixture
def folder(tmp_path):
    """Returns a function (architecture, dtype, **config changes) -> folder of a model in several files."""

    def save(architecture: str, dtype=torch.bfloat16, **changes) -> str:
        if architecture == "granitemoe":
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **STACKED), dtype=dtype)
        elif architecture in whole_models.ARCHITECTURES:
            model = whole_models.make(architecture, dtype, vocab_size=300, **changes)
        else:
            model = AutoModelForCausalLM.from_config(random_models.tiny_config(architecture), dtype=dtype)
        model.save_pretrained(tmp_path / "dense", max_shard_size=sum(p.nbytes for p in model.parameters()) // 2)
        tiny_tokenizer().save_pretrained(tmp_path / "dense")
        return str(tmp_path / "dense")

    return save


@pytest.mark.parametrize("architecture", [*random_models.ARCHITECTURES, "granitemoe"])
def test_reading_gives_what_loading_gives(folder, large, tokens, architecture):
    source = folder(architecture)
    whole, (read, _) = AutoModelForCausalLM.from_pretrained(source, dtype="auto"), load_dense(source)
    assert absent.any_absent(read) and torch.equal(read(tokens).logits, whole(tokens).logits)
    assert read.name_or_path == whole.name_or_path == source
    assert read.config.to_dict() == whole.config.to_dict()
    assert read.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "granitemoe"])
def test_the_bits_of_a_model_in_memory(folder, tmp_path, monkeypatch, architecture, precision, small_steps, quiet):
    source, found = folder(architecture), []
    for share in (0.5, 0):
        monkeypatch.setattr(blockwise, "MEMORY_SHARE", share)
        model, tokenizer = load_dense(source)
        assert absent.any_absent(model) == (share == 0)
        fields = TUNING if architecture == "llama" else {"dataset": None}
        config = CRVQConfig(**FIELDS | fields, work_dir=tmp_path / f"work{share}")
        found.append(quantize_model(model, tokenizer, config))
    whole, read = found
    assert whole_models.equal_state(whole, read) and not absent.any_absent(read)
    assert any(isinstance(module, CRVQLinear) for module in read.modules())
    assert {n: r["relative_error"] for n, r in whole.crvq_report["layers"].items()} == {
        n: r["relative_error"] for n, r in read.crvq_report["layers"].items()
    }
    read.save_pretrained(tmp_path / "out")
    whole_files, read_files = (json.loads((tmp_path / f"work{s}" / "fingerprint.json").read_text()) for s in (0.5, 0))
    assert whole_files == read_files  # either continues what the other has begun


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_through_transformers(folder, tmp_path, monkeypatch, architecture, quiet):
    source, found = folder(architecture), []
    for share in (0.5, 0):
        monkeypatch.setattr(blockwise, "MEMORY_SHARE", share)
        config = CRVQConfig(**FIELDS | {"dataset": None}, work_dir=tmp_path / f"work{share}")
        found.append(AutoModelForCausalLM.from_pretrained(source, quantization_config=config))
    assert whole_models.equal_state(*found) and not absent.any_absent(found[1])
    seen = [json.loads((tmp_path / f"work{share}" / "fingerprint.json").read_text()) for share in (0.5, 0)]
    assert seen[0] == seen[1]


def test_one_block_at_a_time(folder, large, monkeypatch, tmp_path, small_steps, quiet):
    """Whatever is done with the model, no other block's dense weights are in memory."""
    model, tokenizer = load_dense(folder("llama", num_hidden_layers=4))
    blocks, most, fill = list(model.model.layers), [0], absent._fill

    def counting(block):
        left = fill(block)
        linears = [[m for m in b.modules() if is_dense_linear(m) and not m.weight.is_meta] for b in blocks]
        most.append(sum(map(bool, linears)))
        return left

    monkeypatch.setattr(absent, "_fill", counting)
    quantize_model(model, tokenizer, CRVQConfig(**FIELDS, work_dir=tmp_path / "work"))
    assert max(most) == 1 and len(most) > 20


def test_dense_layers_are_let_go(folder, monkeypatch, tmp_path, quiet):
    """In memory or not: kept anywhere, they would stay in fp32."""
    model, _ = load_dense(folder("llama"))
    layer, quantize, found = weakref.ref(model.model.layers[0].mlp.up_proj), block_loop.quantize_block_, []

    def looking(run, index, *streams):
        gc.collect()
        found.append(layer() is None)
        quantize(run, index, *streams)

    monkeypatch.setattr(block_loop, "quantize_block_", looking)
    quantize_model(model, None, CRVQConfig(**FIELDS | {"dataset": None}, work_dir=tmp_path / "work"))
    assert found == [False, True]


def test_a_run_that_was_killed_is_continued(folder, large, tmp_path, monkeypatch, small_steps, quiet):
    source, config = folder("llama"), CRVQConfig(**FIELDS, work_dir=tmp_path / "work")
    expected = quantize_model(*load_dense(source), CRVQConfig(**FIELDS, work_dir=tmp_path / "other"))
    quantize = block_loop.quantize_block_

    def killed(run, index, *streams):
        if index == 1:
            raise KeyboardInterrupt
        quantize(run, index, *streams)

    monkeypatch.setattr(block_loop, "quantize_block_", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(*load_dense(source), config)
    monkeypatch.setattr(block_loop, "quantize_block_", quantize)
    assert whole_models.equal_state(quantize_model(*load_dense(source), config), expected)


def test_it_cannot_write_its_own_text(folder, large):
    with pytest.raises(ValueError, match="do not fit in memory.*give dataset the path of a text file"):
        quantize_model(*load_dense(folder("llama")), CRVQConfig(dataset="self", seqlen=16))


def test_weights_are_dropped_after_a_run_that_fails(folder, large, tokens):
    model, _ = load_dense(folder("llama"))
    with pytest.raises(RuntimeError):
        model.model.layers[0](torch.zeros(1, 2, 33))
    assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())
    assert model(input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize("why", ["the first parameter is in a block", "a block shares a weight"])
def test_models_that_are_loaded_whole(folder, large, monkeypatch, why):
    monkeypatch.setattr(blockwise.BlockFiles, "block_of", lambda self, name: "model.layers.0")
    model, _ = load_dense(folder("llama"))
    assert not absent.any_absent(model)


PROGRAM = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import psutil
from random_models import random_weight
from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint import blockwise
from crvq_hf.checkpoint.sources import load_dense
from crvq_hf.modeling.replace import linear_size, set_quantized_
from crvq_hf.pipeline import quantize_block

def quantize(run, index, name, hessian):
    block = run.blocks[index]
    set_quantized_(block, name, random_weight(run.config.layer_shape(*linear_size(block.get_submodule(name)))))
    run.layers[f"{{run.names[index]}}.{{name}}"] = dict(relative_error=0.0, bits_per_weight=1.0, seconds=0.0)

quantize_block._quantize_linear = quantize
blockwise.MEMORY_SHARE = 0
anonymous = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
before = most = 0

def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
for folder in ({small!r}, {large!r}):  # the first for all that is imported and allocated once
    before = most = anonymous()
    model, _ = load_dense(folder)
    quantize_model(model, None, CRVQConfig(dataset=None, work_dir={work!r} + folder[-5:]))
print("beyond", most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what is in memory and in no file")
@pytest.mark.slow
def test_memory_stays_below_the_size_of_the_model(folder, tmp_path):
    """Of a mixture of experts, which are fused when loaded and would all be in memory."""
    small = Path(folder("qwen3_moe")).rename(tmp_path / "small")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 8, "num_hidden_layers": 20}
    large = folder("qwen3_moe", **sizes)
    dense = sum(file.stat().st_size for file in Path(large).glob("*.safetensors"))
    code = PROGRAM.format(
        tests=str(Path(__file__).parents[1]), small=str(small), large=large, work=str(tmp_path / "w")
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.rpartition("beyond")[2]) < 0.6 * dense
