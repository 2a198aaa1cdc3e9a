"""Quantizing through transformers, and what transformers believes about the result."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

import crvq_hf
from crvq_hf import CRVQConfig, CRVQLinear, quantize_model
from crvq_hf.quantizer import CRVQQuantizer

pytestmark = pytest.mark.usefixtures("pipeline")


def count_layers(model) -> int:
    return sum(isinstance(module, CRVQLinear) for module in model.modules())


@pytest.fixture
def dense(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def tokenizer_folder(tmp_path):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("as_dict", [False, True])
def test_on_the_fly(dense, tokens, tmp_path, pipeline, as_dict):
    config = CRVQConfig(dataset=None, seed=7)
    given = config.to_dict() if as_dict else config
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=given)
    assert count_layers(model) == 14 and len(pipeline) == 1
    called_model, tokenizer, called_config = pipeline[0]
    assert called_model is model and tokenizer is None and called_config == config
    model.save_pretrained(tmp_path / "crvq")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "crvq")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.quantization_config.seed == 7


def test_the_pipeline_sees_a_dense_model_in_evaluation_mode(dense, monkeypatch):
    reference = AutoModelForCausalLM.from_pretrained(dense)
    seen = {}

    def look(model, tokenizer, config, samples, dense_rows):
        seen.update({name: tensor.clone() for name, tensor in model.state_dict().items()}, training=model.training)

    monkeypatch.setattr("crvq_hf.pipeline.quantize_model.quantize_blocks_", look)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=CRVQConfig(dataset=None))
    assert seen.pop("training") is False
    assert seen.keys() == reference.state_dict().keys()
    assert all(torch.equal(tensor, seen[name]) for name, tensor in reference.state_dict().items())


def assert_known_as_quantized(model) -> None:
    assert model.is_quantized and model.config._is_quantized and model.quantization_method == "crvq"
    assert isinstance(model.hf_quantizer, CRVQQuantizer)
    assert isinstance(model.config.quantization_config, CRVQConfig)
    assert "crvq" in model.model_tags
    with pytest.raises(ValueError, match="quantized"):
        model.half()
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()


def test_state_of_a_quantized_model(dense, make_model, tmp_path):
    assert_known_as_quantized(
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=CRVQConfig(dataset=None))
    )
    model = make_model("llama").train()
    assert quantize_model(model, config=CRVQConfig(dataset=None)) is model
    assert_known_as_quantized(model)
    assert not model.training
    model.save_pretrained(tmp_path)
    assert_known_as_quantized(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_metadata_of_the_files(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path / "crvq")
    with safe_open(tmp_path / "crvq" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        assert json.loads(metadata.pop("crvq_sha256")).keys() == set(file.keys())
    assert len(metadata.pop("crvq_config_sha256")) == 64
    assert metadata == {"format": "pt", "crvq_format_version": "3"}
    stored = json.loads((tmp_path / "crvq" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "crvq" and stored["format_version"] == 3
    assert stored["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("dataset", "recorded"),
    [("wikitext2", "wikitext2"), (None, None), (["a secret", "another"], "2 texts"), ("FILE", "private.txt")],
)
def test_no_texts_and_no_paths_of_the_user_are_recorded(make_model, tmp_path, dataset, recorded):
    path = tmp_path / "private.txt"
    path.write_text("secret")
    config = CRVQConfig(dataset=str(path) if dataset == "FILE" else dataset, tokenizer=object(), work_dir=tmp_path)
    model = quantize_model(make_model("llama"), config=config)
    assert model.config.quantization_config.dataset == recorded
    model.save_pretrained(tmp_path / "crvq")
    text = (tmp_path / "crvq" / "config.json").read_text()
    assert "secret" not in text and str(tmp_path) not in text
    assert config.dataset != recorded or dataset == recorded  # the caller's config is left alone


def test_tokenizer_comes_with_the_model_or_from_the_config(dense, make_model, tokenizer_folder, pipeline):
    config = CRVQConfig(dataset=["a b"])
    with pytest.raises(ValueError, match=r"No tokenizer found at '.*dense'.*CRVQConfig\(tokenizer="):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    with pytest.raises(ValueError, match="No tokenizer found at ''"):
        quantize_model(make_model("llama"), config=config)
    assert pipeline == []

    for file in tokenizer_folder.iterdir():
        (dense / file.name).write_bytes(file.read_bytes())
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert pipeline[-1][1].convert_tokens_to_ids("b") == 1
    config.tokenizer = str(tokenizer_folder)
    quantize_model(make_model("llama"), config=config)
    assert pipeline[-1][1].convert_tokens_to_ids("b") == 1
    mine = object()
    quantize_model(make_model("llama"), mine, config)
    assert pipeline[-1][1] is mine
    quantize_model(make_model("llama"), config=CRVQConfig(dataset="self"))
    assert pipeline[-1][1] is None


def test_default_config(make_model, pipeline):
    quantize_model(make_model("llama"))
    assert pipeline[0][2] == CRVQConfig()


def test_a_quantized_model_is_not_quantized_again(make_model):
    model = quantize_model(make_model("llama"), config=CRVQConfig(dataset=None))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is already quantized \(crvq\)"):
        quantize_model(model)


def test_nothing_to_quantize(make_model, pipeline):
    config = CRVQConfig(dataset=None, modules_to_not_convert=["layers"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer to quantize"):
        quantize_model(make_model("llama"), config=config)
    assert pipeline == []


def test_model_without_blocks_is_refused_before_its_weights_are_read(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="has no list of decoder blocks"):
        transformers.ResNetForImageClassification.from_pretrained(
            tmp_path, quantization_config=CRVQConfig(), dtype="float32"
        )


def test_model_on_several_devices_is_refused(make_model):
    model = make_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"must be on one device, found it on \['cpu', 'meta'\]"):
        quantize_model(model)
    with pytest.raises(ValueError, match=r"found it on \['meta'\]"):
        quantize_model(model.to("meta"))


@pytest.mark.parametrize(
    "device_map",
    [{"model": "disk", "lm_head": "cpu"}, {"": "disk"}, {"model": "cpu", "lm_head": 0}, {"model": 0, "lm_head": 1}],
)
def test_on_the_fly_refuses_to_spread(dense, tmp_path, device_map):
    with pytest.raises(ValueError, match="To quantize a model while loading, all of it must be on one device"):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=CRVQConfig(dataset=None), device_map=device_map, offload_folder=tmp_path
        )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_on_the_fly_with_one_device(dense, device_map):
    config = CRVQConfig(dataset=None)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map=device_map)
    assert count_layers(model) == 14


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_tensor_parallelism_is_refused(make_model, pre_quantized):
    model = make_model("llama")
    model.config.distributed_config = transformers.distributed.DistributedConfig(tp_size=2)
    quantizer = CRVQQuantizer(CRVQConfig(), pre_quantized=pre_quantized)
    with pytest.raises(ValueError, match="tensor parallelism over 2"):
        quantizer.preprocess_model(model)


def test_the_checkpoint_wins_over_a_config_given_at_loading(make_model, tmp_path):
    quantize_model(make_model("llama"), config=CRVQConfig(dataset=None, nbits_per_codebook=5)).save_pretrained(
        tmp_path
    )
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CRVQConfig(nbits_per_codebook=9))
    assert loaded.config.quantization_config.nbits_per_codebook == 5


def test_registering_twice_and_reloading():
    old_config, old_quantizer = crvq_hf.config.CRVQConfig, crvq_hf.quantizer.CRVQQuantizer
    try:
        for module in (crvq_hf.config, crvq_hf.quantizer, crvq_hf):
            importlib.reload(module)
        crvq_hf.quantizer.register()
        assert auto.AUTO_QUANTIZER_MAPPING["crvq"] is crvq_hf.quantizer.CRVQQuantizer is not old_quantizer
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["crvq"] is crvq_hf.config.CRVQConfig is not old_config
        names = [cls.__name__ for cls in auto.LOADING_ATTRIBUTES_CONFIG_TYPES]
        assert names.count("CRVQConfig") == 1 and len(names) > 3
    finally:
        crvq_hf.config.CRVQConfig = crvq_hf.quantizer.CRVQConfig = crvq_hf.CRVQConfig = old_config
        crvq_hf.quantizer.CRVQQuantizer = old_quantizer
        crvq_hf.quantizer.register()


def test_the_package_exports_lazily():
    assert crvq_hf.__version__ == "0.2.0"
    names = {
        "CRVQConfig",
        "CRVQLinear",
        "QuantizedWeight",
        "decode",
        "plan",
        "quantize_model",
        "together",
        "write_report",
    }
    assert names == set(crvq_hf.__all__)
    assert all(hasattr(crvq_hf, name) for name in crvq_hf.__all__)
    with pytest.raises(AttributeError, match="module 'crvq_hf' has no attribute 'nonsense'"):
        _ = crvq_hf.nonsense


def run_python(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CRVQ_AUTOLOAD": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)


def test_in_a_fresh_interpreter(make_model, tmp_path):
    """One import is enough to load; without it loading fails loudly; and the import leaves the algorithm alone."""
    quantize_model(make_model("llama"), config=CRVQConfig(dataset=None)).save_pretrained(tmp_path)
    result = run_python(f"""
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except RuntimeError as error:
    print("without:", error)
import crvq_hf
[getattr(module, "__file__", None) for module in [*sys.modules.values()]]  # as debuggers and torch do
rooms = ("algorithm", "commands", "evaluation", "pipeline", "sharing", "tuning")
assert not {{f"crvq_hf.{{room}}" for room in rooms}} & set(sys.modules)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print("with:", type(model.model.layers[0].mlp.up_proj).__name__)
""")
    assert result.returncode == 0, result.stderr
    without, loaded = result.stdout.strip().splitlines()[0], result.stdout.strip().splitlines()[-1]
    assert without.startswith("without:") and "mismatch" in without
    assert "Unknown quantization type, got crvq" in result.stderr
    assert loaded == "with: CRVQLinear"


def test_auto_config_needs_nothing(make_model, tmp_path):
    quantize_model(make_model("llama"), config=CRVQConfig(dataset=None)).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "crvq"
