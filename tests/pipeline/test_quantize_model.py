"""`quantize_model`: which models it takes, which tokenizer it finds, and what it leaves in the cache."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import TEXT, save_tiny, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from whole_models import OFF

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint import sources
from crvq_hf.pipeline import fingerprint

TINY = OFF | {"nsamples": 2, "seqlen": 16, "nbits_per_codebook": 4}


@pytest.fixture
def asked(monkeypatch):
    """Returns the list of calls that load a tokenizer."""
    calls = []

    def from_pretrained(name, **options):
        calls.append((str(name), options))
        return tiny_tokenizer()

    monkeypatch.setattr(sources, "AutoTokenizer", SimpleNamespace(from_pretrained=from_pretrained))
    return calls


@pytest.mark.parametrize("wrap", ["PeftModel", "injected", "merged"])
def test_adapters_are_to_be_merged_first(wrap, pipeline):
    peft = pytest.importorskip("peft")
    model, config = tiny_model(), peft.LoraConfig(target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config)
    if wrap == "merged":
        quantize_model(adapted.merge_and_unload(), config=CRVQConfig(dataset=None))
        assert len(pipeline) == 1
        return
    given = adapted if wrap == "PeftModel" else model
    with pytest.raises(
        ValueError, match=r"has PEFT adapters, .* merge them first: model = model\.merge_and_unload\(\)"
    ):
        quantize_model(given, config=CRVQConfig(dataset=None))
    assert not pipeline


def test_what_is_no_transformers_model_is_refused(monkeypatch, pipeline):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module, self.config = inner, inner.config

    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with pytest.raises(ValueError, match="takes a transformers model, got Wrapper; give the model that is inside"):
        quantize_model(Wrapper(tiny_model()), config=CRVQConfig(dataset=None))


def test_widths_that_do_not_fit_are_told(pipeline):
    model = tiny_model(hidden_size=36, intermediate_size=60, num_attention_heads=6)
    with pytest.raises(
        ValueError, match=r"such as model\.layers\.0\.\w+\.q_proj, because its 36 .* multiple of 8"
    ) as caught:
        quantize_model(model, config=CRVQConfig(dataset=None))
    assert "multiple of 8" in str(caught.value) and "modules_to_not_convert" not in str(caught.value)
    assert "in_group_size (4, 8 or 16)" in str(caught.value)
    with pytest.raises(ValueError, match="because named in modules_to_not_convert"):
        quantize_model(tiny_model(), config=CRVQConfig(dataset=None, modules_to_not_convert=["layers"]))


def test_the_tokenizer_is_loaded_as_the_model_was(tmp_path, asked, pipeline):
    save_tiny(tmp_path / "inner")
    options = {
        "subfolder": "inner",
        "cache_dir": str(tmp_path / "cache"),
        "token": "secret",
        "trust_remote_code": True,
    }
    config = CRVQConfig(dataset=[TEXT])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, **options)
    assert len(asked) == 1 and asked[0][0] == str(tmp_path)
    assert options.items() <= asked[0][1].items()
    assert "adjust_generation_fn" not in model.__dict__ and "secret" not in str(model.hf_quantizer.__dict__)
    assert model.generation_config.bos_token_id == 0  # was loaded all the same
    config = CRVQConfig(dataset=[TEXT], tokenizer="other/name")
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, revision="v1", **options)
    name, given = asked[1]  # of another repository
    assert name == "other/name" and given["token"] == "secret" and not {"subfolder", "revision"} & given.keys()


def test_a_revision_goes_with_it(asked):
    sources.load_tokenizer("some/model", "some/model", {"revision": "v1", "unknown": 1})
    sources.load_tokenizer("other/model", "some/model", {"revision": "v1", "token": "t"})
    assert asked == [("some/model", {"revision": "v1"}), ("other/model", {"token": "t"})]


def test_options_can_be_given_for_a_model_in_memory(tmp_path, asked, pipeline):
    save_tiny(tmp_path / "inner")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    quantize_model(model, config=CRVQConfig(dataset=[TEXT]), options={"subfolder": "inner"})
    assert asked == [(str(tmp_path), {"subfolder": "inner"})]


def test_a_model_that_is_loaded_dense_hears_nothing(tmp_path):
    save_tiny(tmp_path)
    assert "adjust_generation_fn" not in AutoModelForCausalLM.from_pretrained(tmp_path).__dict__
    assert AutoTokenizer.from_pretrained(tmp_path)("the")["input_ids"]


@pytest.mark.parametrize("named", [True, False])
def test_a_work_folder_that_stays_in_the_cache_is_told(tmp_path, monkeypatch, caplog, quiet, named):
    monkeypatch.setattr(fingerprint, "WORK_FOLDERS", tmp_path / "cache")
    config = CRVQConfig(dataset=None, work_dir=tmp_path / "mine" if named else None, **TINY)
    with caplog.at_level(logging.WARNING, logger="crvq"):
        quantize_model(tiny_model(num_hidden_layers=1), config=config)
    told = [line for line in caplog.messages if "crvq doctor --clean removes it" in line]
    assert len(told) == (not named)
    if not named:
        (folder,) = (tmp_path / "cache").iterdir()
        assert f"The work folder {folder} (" in told[0]
        assert (folder / "finished.safetensors").is_file()


def test_a_cache_that_cannot_be_written_in_names_the_field(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fingerprint, "WORK_FOLDERS", tmp_path / "file" / "crvq")
    with pytest.raises(ValueError, match="cannot be written in .*; name a folder elsewhere with work_dir"):
        quantize_model(tiny_model(), config=CRVQConfig(dataset=None, **TINY))


def test_tokens_that_the_model_does_not_have_are_refused_before_the_work(tmp_path):
    config = CRVQConfig(dataset=[TEXT], work_dir=tmp_path / "work", **TINY)
    model = tiny_model(vocab_size=100)
    with pytest.raises(ValueError, match="the embedding of LlamaForCausalLM has 100 rows"):
        quantize_model(model, tiny_tokenizer(), config)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_code_of_the_model_s_own_that_may_run_may_run_for_its_tokenizer(tmp_path, pipeline):
    """A model and a tokenizer whose classes lie beside the weights."""
    folder = save_tiny(tmp_path / "own")
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig): model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM): config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    for file, changes in [
        ("config.json", {"model_type": "own", "architectures": ["OwnModel"], "auto_map": maps}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        ),
    ]:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))
    options = {"trust_remote_code": True}
    config = CRVQConfig(dataset=[TEXT])
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    quantize_model(AutoModelForCausalLM.from_pretrained(folder, **options), config=config)
    assert [type(tokenizer).__name__ for _, tokenizer, _ in pipeline] == ["OwnTokenizer"] * 2


def test_a_model_that_cannot_write_tells_where_its_files_are(tmp_path, asked, pipeline):
    save_tiny(tmp_path / "inner")
    config = CRVQConfig(dataset=[TEXT], e2e_finetune_epochs=0)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, subfolder="inner", quantization_config=config)
    assert asked == [(str(tmp_path), {"subfolder": "inner"})]


@pytest.mark.parametrize(("subfolder", "options"), [("", {}), ("in/ner", {"subfolder": "in/ner"})])
def test_files_in_a_cache_tell_the_revision(subfolder, options):
    file = f"/cache/models--some--model/snapshots/0123abc/{subfolder}/model.safetensors".replace("//", "/")
    expected = {"cache_dir": "/cache", "revision": "0123abc"} | options
    assert sources._options_of([file], "some/model") == expected
    assert sources._options_of(["/elsewhere/model.safetensors"], "some/model") == sources._options_of([], "x") == {}
