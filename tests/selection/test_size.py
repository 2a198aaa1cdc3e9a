"""A size of the whole checkpoint: kept to the byte, spent where least is lost, refused before any work."""

import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from many_models import build
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.info import read_info
from crvq_hf.commands.cli import main
from crvq_hf.config import DECIDED, FIELDS
from crvq_hf.selection import size
from crvq_hf.selection.choice import choose_layers

LARGE = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made from now on."""
    made, tell = [], size._tell
    monkeypatch.setattr(size, "_tell", lambda fit, plan, planned: (made.append(plan), tell(fit, plan, planned)))
    return made


def bytes_of(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def dense_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["a prompt before the text", "an encoder and its decoder", "no head"])
def test_every_byte_of_other_models_is_known(tmp_path, plans, pipeline, architecture):
    model = build(architecture)
    fit = int(0.6 * dense_bytes(model))
    quantize_model(model, config=CRVQConfig(dataset=None, fit=fit)).save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == plans[0].nbytes <= fit


@pytest.mark.parametrize("share", [0.45, 0.75])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("gemma3_text", {}),
        ("opt", {}),
    ],
)
def test_every_byte_is_known_before(make_model, tmp_path, plans, pipeline, architecture, fields, share):
    model = make_model(architecture, **fields)
    fit = int(share * dense_bytes(model))
    quantize_model(model, config=CRVQConfig(dataset=None, fit=fit)).save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == plans[0].nbytes <= fit


@pytest.mark.parametrize("tied", [False, True])
def test_every_byte_of_a_large_vocabulary_is_known(make_model, tmp_path, plans, pipeline, tied):
    model = make_model("llama", torch.bfloat16, vocab_size=4000, hidden_size=128, tie_word_embeddings=tied)
    fit = dense_bytes(model) - 4000 * 130  # too little for embeddings as they are
    quantize_model(model, config=CRVQConfig(dataset=None, fit=fit)).save_pretrained(tmp_path)
    assert plans[0].config.embedding_bits < 16 and bytes_of(tmp_path) == plans[0].nbytes <= fit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_spent_within_one_percent(make_model, tmp_path, plans, pipeline, dtype, tied):
    model = make_model("llama", dtype, tie_word_embeddings=tied, **LARGE)
    for share in (0.2, 0.25) if dtype == torch.float32 else (0.4, 0.5):
        choose_layers(model, CRVQConfig(fit=int(share * dense_bytes(model))))
        assert 0.99 * share * dense_bytes(model) <= plans[-1].nbytes <= share * dense_bytes(model)
    quantize_model(model, config=CRVQConfig(dataset=None, fit=plans[-1].nbytes)).save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == plans[-1].nbytes
    config = read_info(str(tmp_path)).crvq
    assert config.fit is None and config.bits is None and config.embedding_bits == plans[-1].config.embedding_bits


def test_the_command_counts_tokenizer_and_report(tmp_path, capsys, caplog, plans):
    pytest.importorskip("matplotlib")
    dense, out, fit = tmp_path / "dense", tmp_path / "out", 800_000
    tiny_model(hidden_size=256).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    command = ["quantize", str(dense), str(out), "--dataset", "none", "--fit", "800 kB"]
    assert main(command) == 0
    reports = sum(file.stat().st_size for file in out.glob("report.*"))
    assert bytes_of(out) - reports == plans[0].nbytes - plans[0].parts["report"]
    assert 0.7 * plans[0].parts["report"] < reports <= plans[0].parts["report"] and plans[0].nbytes <= fit
    printed = capsys.readouterr().out
    assert f"{bytes_of(out) / 1e6:.3f} MB of 0.800 MB to fit in, in {out}" in printed
    parts = ("linears", "embedding", "head", "norms, biases", "tokenizer", "report")
    assert all(part in caplog.text for part in ("Planned for fit=0.800 MB", *parts))
    assert "bits per weight" in caplog.text and "by a curve of SmolLM2-135M" in caplog.text
    report = json.loads((out / "report.json").read_text())
    assert report["command"]["config"]["fit"] == fit and main(command) == 0  # it is finished


def test_from_python_the_tokenizer_counts(tmp_path, plans, pipeline):
    source, out = save_tiny(tmp_path / "dense"), tmp_path / "out"
    config = CRVQConfig(dataset=None, fit="90kB")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    assert bytes_of(out) == plans[0].nbytes <= 90_000 and plans[0].parts["tokenizer"] > 8_000


def test_what_cannot_be_met_is_refused_before_any_work(tmp_path, capsys, pipeline):
    source = save_tiny(tmp_path / "dense")
    for fit, message in [
        ("10kB", "is too little for LlamaForCausalLM"),
        ("1GB", "holds LlamaForCausalLM as it is, in 0.4"),
    ]:
        assert main(["quantize", str(source), str(tmp_path / "out"), "--dataset", "none", "--fit", fit]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message in line and "quantized it takes 0.4" in line and " MB to 0.5" in line
    assert not pipeline and [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", DECIDED["fit"])
def test_a_size_and_what_it_decides_exclude_each_other(name):
    value = {"bits": 2, "overrides": {"a": {"critical_ratio": 1.0}}}.get(name, FIELDS[name].default)
    with pytest.raises(ValueError, match=f"fit=10000000 chooses bits, .*; leave out {name}"):
        CRVQConfig(fit=10_000_000, **{name: value})
    config = CRVQConfig(fit="10MB")
    assert CRVQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(st.sampled_from(["", "B", "kB", "MB", "GB", "KiB", "MiB", "GiB", "mb"]), st.integers(1, 5000))
def test_units(unit, number):
    prefix, binary = unit[:1].upper(), "i" in unit
    power = 0 if prefix in ("", "B") else 1 + "KMG".index(prefix)
    expected = number * (1024 if binary else 1000) ** power
    assert CRVQConfig(fit=f"{number}{unit}").fit == CRVQConfig(fit=f" {number}.0 {unit} ").fit == expected


def test_the_least_loss_is_chosen(make_model, plans):
    """Few bits of embeddings while linears can make more of the bytes, as stored where these have enough."""
    model = make_model("llama", torch.bfloat16, vocab_size=4000, hidden_size=256, intermediate_size=512)
    least, most = 2 * 4000 * 258, 2 * 4000 * 512
    for fit in (least + 400_000, least + 700_000, most + 1_300_000):
        choose_layers(model, CRVQConfig(fit=fit))
    few, more, all_of_them = (plan.config.embedding_bits for plan in plans)
    assert few <= more < all_of_them == 16
    assert plans[0].bits < plans[1].bits and plans[0].loss > plans[1].loss > plans[2].loss


@pytest.mark.parametrize("points", [size._OF_LINEARS, size._OF_EMBEDDINGS])
def test_the_curves_fall_and_pass_through_what_was_measured(points):
    losses = [size._loss(points, bits) for bits in (0.6, 1.141, 1.5, 1.993, 2.5, 2.998, 4, 6, 8)]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    for bits, times in points:
        assert math.exp(size._loss(points, bits)) == pytest.approx(times)


def test_what_other_code_reads_is_not_counted_as_few_bits(make_model, plans, caplog):
    model = make_model("llama", tie_word_embeddings=False)
    forward = model.forward
    model.forward = lambda *args, **kwargs: (model.lm_head.weight * 1, forward(*args, **kwargs))[1]
    with caplog.at_level(logging.WARNING, "crvq"):
        _, rows = choose_layers(model, CRVQConfig(fit=int(0.5 * dense_bytes(model))))
    assert rows == {"lm_head"} and plans[0].parts["head"] == model.lm_head.weight.nbytes
    assert plans[0].config.embedding_bits < 16 and "lm_head stays as it is" in caplog.text
