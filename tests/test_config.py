"""`CRVQConfig`: what each field accepts, and that it survives every way of being copied and stored."""

import copy
import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from crvq_hf import CRVQConfig
from crvq_hf.config import FIELDS

ACCEPTED = {
    "quant_method": ["crvq"],
    "quantizer_package": ["crvq-hf"],
    "format_version": [1, 3],
    "bits": [None, 1, 1.1, 4.0],
    "fit": [None, 1, 4 * 10**9],
    "in_group_size": [4, 8, 16],
    "nbits_per_codebook": [4, 8, 12],
    "num_extended_codebooks": [0, 7],
    "critical_ratio": [0, 0.02, 0.5, 1],
    "overrides": [None, {r"layers\.[01]": {"critical_ratio": 1.0}, "v_proj": {"in_group_size": 4}}],
    "codebook_bits": [8, 16],
    "importance": ["weight_activation", "weight", "random"],
    "dataset": ["self", "wikitext2", "c4", "texts.txt", ["one text", "another"], None],
    "nsamples": [1, 4096],
    "seqlen": [1, 4096],
    "seed": [0, 2**40],
    "embedding_bits": [2, 2.5, 3, 4, 6, 8, 16],
    "block_finetune_epochs": [0, 9],
    "e2e_finetune_epochs": [0, 9],
    "e2e_nsamples": [0, 1, 4096],
    "modules_to_not_convert": [None, [], ["lm_head", r"layers\.[01]"]],
    "tokenizer": [None, "name", object()],
    "device": [None, "cpu", "cuda:1", torch.device("cpu")],
    "work_dir": [None, "folder"],
    "dequantize": [True, False],
}
REJECTED = {
    "quant_method": ["gptq", None],
    "quantizer_package": ["other", None],
    "format_version": [0, 6, "1", 1.0, None, True],
    "bits": [0.4, 9, "1.1", float("nan"), True],
    "fit": [0, -1, "", "4 parsecs", "40Mbit", "40M", "MB", "-4GB", "4,5GB", "1e99", float("nan"), True, [1]],
    "in_group_size": [0, 2, 32, "8", None, True],
    "nbits_per_codebook": [3, 13, 8.0, "8", None, True],
    "num_extended_codebooks": [-1, 8, 1.5, None, False],
    "critical_ratio": [-0.01, 1.01, float("nan"), float("inf"), "0.1", None, True],
    "overrides": [
        [],
        ["layers.0"],
        "layers.0",
        "[",
        {"a": 1},
        {"a": {}},
        {"": {"critical_ratio": 1}},
        {1: {"critical_ratio": 1}},
    ]
    + [{"*.": {"critical_ratio": 1}}, {"a": {"codebook_bits": 8}}, {"a": {"in_group_size": 5}}],
    "codebook_bits": [4, 32, "8", None, True],
    "importance": ["activation", 0, None],
    "dataset": ["", [], [1], 5, {"a": 1}, (text for text in "ab")],
    "nsamples": [0, -1, 1.0, None, True],
    "seqlen": [0, -1, 2.0, None],
    "seed": [-1, 0.5, None],
    "embedding_bits": [5, 1, 32, "8", None, True],
    "block_finetune_epochs": [-1, 0.5, None, True],
    "e2e_finetune_epochs": [-1, 0.5, None, True],
    "e2e_nsamples": [-1, 1.0, None, True],
    "modules_to_not_convert": ["lm_head", [1], [""], 3, ["*."]],
    "tokenizer": [],
    "device": ["gpu please", 1.5],
    "work_dir": ["", 3],
    "dequantize": ["yes", 1, None],
}


def cases(table):
    """Returns a case for every value; no addresses in their names, which processes that share the tests compare."""

    def text(value):
        return re.sub(r" at 0x\w+", "", f"{value!r}")

    return [pytest.param(name, value, id=f"{name}={text(value)}"[:60]) for name in table for value in table[name]]


def test_tables_cover_every_field():
    assert set(ACCEPTED) == set(REJECTED) == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepted(name, value):
    assert getattr(CRVQConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), cases(REJECTED))
def test_rejected(name, value):
    with pytest.raises(ValueError, match=name):
        CRVQConfig(**{name: value})
    config = CRVQConfig()
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == FIELDS[name].default


def test_paths_and_tuples_are_normalised():
    config = CRVQConfig(dataset=Path("a/b"), work_dir=Path("c"), modules_to_not_convert=("x",), critical_ratio=0)
    assert (config.dataset, config.work_dir, config.modules_to_not_convert) == ("a/b", "c", ["x"])
    assert isinstance(config.critical_ratio, float)
    assert CRVQConfig(dataset=("a", "b")).dataset == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "closest"),
    [("nbits", "nbits_per_codebook"), ("group_size", "in_group_size"), ("critical_ration", "critical_ratio")],
)
def test_unknown_field_names_the_closest(name, closest):
    with pytest.raises(ValueError, match=f"no field '{name}', did you mean '{closest}'"):
        CRVQConfig(**{name: 1})


def test_unknown_version_is_reported_before_its_unknown_fields():
    with pytest.raises(ValueError, match="format_version 7.*only format_version 1, 2, 3, 4 and 5"):
        CRVQConfig(format_version=7, something_new=1)


stored_fields = {
    "in_group_size": st.sampled_from([4, 8, 16]),
    "nbits_per_codebook": st.integers(4, 12),
    "num_extended_codebooks": st.integers(0, 7),
    "critical_ratio": st.floats(0, 0.5),
    "dataset": st.none() | st.lists(st.text(), min_size=1),
    "modules_to_not_convert": st.none() | st.lists(st.sampled_from(["lm_head", "up_proj"])),
    "seed": st.integers(0, 2**62),
    "embedding_bits": st.sampled_from([2, 2.5, 8, 16]),
    "codebook_bits": st.sampled_from([8, 16]),
}


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=stored_fields))
def test_survives_json(fields):
    config = CRVQConfig(**fields)
    assert CRVQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CRVQConfig.from_dict(json.loads(config.to_json_string())) == config
    assert dict(config) == config.to_dict() == config.to_diff_dict()


def test_runtime_fields_are_not_stored():
    config = CRVQConfig(tokenizer=object(), device=torch.device("cpu"), work_dir="w", dequantize=True)
    assert not {"tokenizer", "device", "work_dir", "dequantize"} & set(config.to_dict())
    assert CRVQConfig.from_dict(config.to_dict()) == CRVQConfig()
    assert set(config.to_dict()) | {"bits", "fit", "overrides"} == {
        n for n, field in FIELDS.items() if field.metadata["stored"]
    }


def test_format_version_is_the_oldest_that_can_hold_it():
    config = CRVQConfig(codebook_bits=16)
    # A reader that knows only format 1 would refuse fields of later ones.
    assert config.format_version == 1 and not {"embedding_bits", "codebook_bits"} & set(config.to_dict())
    config.embedding_bits = 8
    assert config.to_dict()["embedding_bits"] == 8 and config.to_dict()["format_version"] == 2
    assert "codebook_bits" not in config.to_dict()
    assert CRVQConfig.from_dict(CRVQConfig(codebook_bits=16).to_dict(), embedding_bits=8) == config
    config.codebook_bits = 8
    assert config.to_dict()["codebook_bits"] == 8 and config.to_dict()["format_version"] == 3
    config.embedding_bits = 2.5
    assert config.to_dict()["embedding_bits"] == 2.5 and config.to_dict()["format_version"] == 4
    assert CRVQConfig.from_dict(config.to_dict()) == config
    config.codebook_bits = 16
    assert config.to_dict()["codebook_bits"] == 16 and config.to_dict()["format_version"] == 4
    config.overrides = {"layers.0": {"critical_ratio": 1.0}}
    assert config.to_dict()["overrides"] == config.overrides and config.to_dict()["format_version"] == 5
    assert CRVQConfig.from_dict(config.to_dict()) == config
    config.codebook_bits, config.embedding_bits, config.overrides = 8, 16, None
    assert config.format_version == 3 and config == CRVQConfig() and "overrides" not in config.to_dict()


def test_overrides_of_some_layers():
    overrides = {"layers.0": {"critical_ratio": 1}, "v_proj": {"nbits_per_codebook": 6}}
    config = CRVQConfig(overrides=json.dumps(overrides))  # as on the command line
    assert config.overrides == overrides
    first, value, other = (config.of_layer(f"model.layers.{name}") for name in ("0.v_proj", "10.v_proj", "10.q_proj"))
    assert (first.critical_ratio, first.nbits_per_codebook) == (1.0, 6)
    assert (value.critical_ratio, value.nbits_per_codebook) == (0.04, 6)
    with pytest.raises(ValueError, match="overrides set nbits_per_codebook of a.v to 6 and, by 'a', to 8; let one"):
        CRVQConfig(overrides={"v": {"nbits_per_codebook": 6}, "a": {"nbits_per_codebook": 8}}).of_layer("a.v")
    assert other is config and config.layer_shape(576, 64).nbits == 8 and value.layer_shape(576, 64).nbits == 6
    config.to_dict()["overrides"]["layers.0"]["critical_ratio"] = 0.5
    assert config.overrides == overrides


@pytest.mark.parametrize("version", [1, 2])
def test_older_formats_have_float16_codebooks(version):
    assert CRVQConfig.from_dict({"format_version": version, "in_group_size": 4}).codebook_bits == 16


def test_stored_lists_are_copies():
    config = CRVQConfig(modules_to_not_convert=["a"])
    config.to_dict()["modules_to_not_convert"].append("b")
    assert config.modules_to_not_convert == ["a"]


def test_from_dict_takes_overrides():
    config, unused = CRVQConfig.from_dict({"seed": 1}, return_unused_kwargs=True, seed=2, foo=3)
    assert config.seed == 2 and unused == {"foo": 3}
    with pytest.raises(ValueError, match="seed"):
        CRVQConfig.from_dict({}, seed=-1)


def test_deepcopy_and_inequality():
    config = CRVQConfig(dataset=["text"], tokenizer={"a": 1})
    copied = copy.deepcopy(config)
    assert copied == config and copied.dataset is not config.dataset
    assert config != CRVQConfig() and config != "crvq"


def test_inside_a_model_config(tmp_path):
    model_config = AutoConfig.for_model("llama")
    model_config.quantization_config = CRVQConfig(seed=5)
    model_config.save_pretrained(tmp_path)
    assert CRVQConfig.from_dict(AutoConfig.from_pretrained(tmp_path).quantization_config) == CRVQConfig(seed=5)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_help(name):
    assert len(FIELDS[name].metadata["help"]) > 10


@pytest.mark.parametrize(
    ("size", "fields", "expected"),
    [
        # (num_codebooks, codebook_size, num_critical_groups, num_virtual_groups)
        ((4096, 4096), {}, (2, 256, 20, 512 + 20)),
        ((64, 4096), {"num_extended_codebooks": 3}, (4, 256, 1, 8 + 3)),  # at least one critical group
        ((64, 4096), {"critical_ratio": 0}, (1, 256, 0, 8)),
        ((64, 4096), {"num_extended_codebooks": 0}, (1, 256, 0, 8)),
        ((32, 16), {"nbits_per_codebook": 12}, (2, 64, 1, 4 + 1)),  # no more entries than groups in the layer
        ((64, 64), {"critical_ratio": 0.5, "in_group_size": 4, "num_extended_codebooks": 1}, (2, 256, 8, 16 + 8)),
    ],
)
def test_layer_shape(size, fields, expected):
    shape = CRVQConfig(**fields).layer_shape(*size)
    found = (shape.num_codebooks, shape.codebook_size, shape.num_critical_groups, shape.num_virtual_groups)
    assert found == expected
    assert (shape.in_features, shape.out_features) == size


def test_layer_shape_of_channels_that_do_not_fit():
    with pytest.raises(ValueError, match="36 input channels cannot be cut into groups of 8"):
        CRVQConfig().layer_shape(36, 8)


@pytest.mark.parametrize("kind", ["numpy", "pandas", "datasets", "tuple"])
def test_columns_of_texts_and_names(kind):
    texts = ["one", "two"]
    if kind == "numpy":
        column = numpy.array(texts)
    elif kind == "tuple":
        column = tuple(texts)
    else:
        module = pytest.importorskip(kind)
        table = module.DataFrame({"text": texts}) if kind == "pandas" else module.Dataset.from_dict({"text": texts})
        column = table["text"]
    config = CRVQConfig(dataset=column, modules_to_not_convert=column)
    assert config.dataset == config.modules_to_not_convert == texts
    assert {type(text) for text in config.dataset} == {str}
    json.dumps(config.to_dict())


def test_tables_and_sets_are_no_texts():
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    table = {"text": ["one"]}
    for value in (pandas.DataFrame(table), datasets.Dataset.from_dict(table), table, {"one"}, numpy.array([["one"]])):
        with pytest.raises(ValueError, match="column of texts, a list of dicts .* or None, got ") as caught:
            CRVQConfig(dataset=value)
        assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_torch():
    config = CRVQConfig(
        nsamples=numpy.int64(8),
        seqlen=torch.tensor(16),
        critical_ratio=numpy.float32(0.5),
        seed=numpy.array(3),
        dequantize=numpy.bool_(True),
        importance=numpy.str_("weight"),
    )
    assert config == CRVQConfig(
        nsamples=8, seqlen=16, critical_ratio=0.5, seed=3, dequantize=True, importance="weight"
    )
    json.dumps(config.to_dict())
    for value in (numpy.float64(8.5), numpy.bool_(True)):
        with pytest.raises(ValueError, match="nsamples must be an integer"):
            CRVQConfig(nsamples=value)
