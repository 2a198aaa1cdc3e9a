"""Embeddings and heads in fewer than 8 bits: frequent rows, rows of zeros, what is refused, and whole runs."""

import pytest
import shrink
import torch
from random_models import quantized_model
from safetensors.torch import load_file
from tiny import TEXT, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from whole_models import FIELDS, make

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.algorithm import tables
from crvq_hf.calibration.tokens import counted_tokens
from crvq_hf.modeling.coded import CodedEmbedding, CodedHead
from crvq_hf.modeling.table import TableShape
from crvq_hf.pipeline.table_fit import fit_table
from crvq_hf.tuning import end_to_end
from crvq_hf.tuning.tables import tunable_tables

pytestmark = pytest.mark.usefixtures("precision", "quiet")


def fit(weight, bits=2.5, metric=None, counts=None):
    shape = TableShape(*weight.shape, bits)
    metric = torch.eye(weight.shape[1]) if metric is None else metric
    counts = torch.zeros(0, dtype=torch.int64) if counts is None else counts
    table, error = fit_table(weight, metric, counts, shape, torch.Generator().manual_seed(0))
    return table, table.dequantize(torch.float32), error


def row_errors(found, weight):
    return (found - weight).square().sum(1) / weight.square().sum(1)


def test_rows_of_frequent_tokens_come_out_better():
    torch.manual_seed(0)
    weight, counts = torch.randn(3000, 128), torch.zeros(2500, dtype=torch.int64)
    counts[1000:1050] = 7
    table, found, _ = fit(weight, 3, counts=counts)
    assert {*range(1000, 1050)} <= {*table.rows.tolist()}
    assert 0 in table.rows  # of those which do not come, tokens with low numbers, which are the frequent ones
    errors = row_errors(found, weight)
    rare = torch.ones(3000, dtype=torch.bool)
    rare[table.rows.long()] = False
    assert errors[1000:1050].mean() < 0.1 * errors[rare].mean() < 0.02


def test_what_rows_have_in_common_costs_nothing():
    torch.manual_seed(0)
    own = torch.randn(2000, 64)
    _, alone, _ = fit(own)
    _, found, _ = fit(own + 20 * torch.randn(64))
    error = (found - found.mean(0) - (own - own.mean(0))).square().mean()
    assert error < 1.2 * (alone - own).square().mean()


def test_the_metric_decides_where_errors_are():
    torch.manual_seed(0)
    weight, metric = torch.randn(2000, 64), torch.eye(64)
    metric.diagonal()[:8] *= 100
    _, plain, _ = fit(weight)
    _, found, _ = fit(weight, metric=metric)
    assert (found - weight)[:, :8].square().sum() < 0.6 * (plain - weight)[:, :8].square().sum()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e3], ids=str)
def test_rows_of_any_size(scale):
    """Padding is zeros, or next to it; rows that no text reaches may have any size."""
    torch.manual_seed(0)
    weight = torch.randn(600, 32)
    weight[5::7] *= scale
    table, found, _ = fit(weight)
    table.check("table")
    others = torch.ones(600, dtype=torch.bool)
    others[5::7] = False
    assert found.isfinite().all()
    assert row_errors(found, weight)[others].mean() < 0.3
    largest = found[5::7].abs().amax()
    assert largest < 1e-2 if scale < 1e-3 else row_errors(found, weight)[5::7].mean() < 0.3
    assert torch.equal(*fit(torch.zeros(50, 8))[1:2], torch.zeros(50, 8))


def test_most_rows_are_encoded_with_the_codebooks_of_some(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(1500, 32)
    _, _, at_once = fit(weight)
    monkeypatch.setattr(tables, "SAMPLED_ROWS", 400)
    _, _, in_parts = fit(weight)
    assert in_parts < 1.15 * at_once


@pytest.mark.parametrize("scale", [1e8, 1e30])
def test_what_float16_cannot_hold_is_refused(tmp_path, scale):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight.data *= scale
    with pytest.raises(
        ValueError, match=r"^lm_head cannot be stored in 3 bits \(.*float16.*\); check its weights, or"
    ):
        quantize_model(model, config=CRVQConfig(dataset=None, embedding_bits=3, work_dir=tmp_path / "work"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tied", [False, True])
def test_bad_weights_are_refused_by_name(tmp_path, value, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.model.embed_tokens.weight.data[3, 2] = value
    with pytest.raises(ValueError, match="model.embed_tokens holds NaN"):
        quantize_model(model, config=CRVQConfig(dataset=None, embedding_bits=3, work_dir=tmp_path / "work"))


def test_widths_that_are_no_groups_stay_dense(tmp_path, caplog):
    model = tiny_model(hidden_size=36, num_attention_heads=6, num_key_value_heads=6, intermediate_size=64)
    config = CRVQConfig(dataset=None, in_group_size=4, embedding_bits=2, work_dir=tmp_path / "work")
    assert type(quantize_model(model, config=config).lm_head) is CodedHead
    model = make("gpt2", n_embd=66, n_inner=64, n_head=3)
    config = CRVQConfig(dataset=None, in_group_size=4, embedding_bits=2, work_dir=tmp_path / "other")
    quantize_model(model, config=config)
    assert type(model.lm_head) is torch.nn.Linear and "embedding_bits=2 cannot replace it" in caplog.text
    assert model.config.quantization_config.embedding_bits == 16


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_run(tmp_path, small_steps, monkeypatch, tied):
    """Targets are those of the full-precision model, with its own embedding and head; the coded ones are tuned."""
    model, dense = (make("llama", torch.bfloat16, tie_word_embeddings=tied) for _ in range(2))
    dense.float()
    teachers, loss = [], end_to_end.distillation_loss

    def look(own, teacher):
        teachers.append(teacher)
        return loss(own, teacher)

    monkeypatch.setattr(end_to_end, "distillation_loss", look)
    work = tmp_path / "work"
    quantize_model(model, config=CRVQConfig(**FIELDS, embedding_bits=3, work_dir=work))
    assert type(model.model.embed_tokens) is CodedEmbedding and type(model.lm_head) is CodedHead
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        outputs = [dense(row[None]).logits for row in load_file(work / "calibration.safetensors")["tokens"]]
    assert teachers and all(any((t[:1] - o).norm() < 0.05 * o.norm() for o in outputs) for t in teachers)
    fitted = load_file(work / "embeddings.safetensors")
    for part in ("model.embed_tokens", *(() if tied else ("lm_head",))):
        tuned = model.get_submodule(part)
        for name in ("weight_row_scale", "weight_frequent_scale"):  # codebooks, as stored, take more than five steps
            before, after = fitted[f"{part}.{name}"].float(), tuned.get_parameter(name).float()
            assert 0 < (before - after).norm() < 0.3 * before.norm(), (part, name)
        for name in ("weight", "weight_frequent", "weight_frequent_rows"):
            assert torch.equal(fitted[f"{part}.{name}"], tuned.get_parameter(name))
        assert "lookup" not in tuned.__dict__ and "product" not in tuned.__dict__


def test_a_model_that_asks_its_head_for_its_dtype_is_tuned(tmp_path, small_steps):
    model = shrink.tiny_model("mamba2", AutoModelForCausalLM)
    quantize_model(model, config=CRVQConfig(**FIELDS, embedding_bits=3, work_dir=tmp_path / "work"))
    assert type(model.lm_head) is CodedHead and model.crvq_report["e2e_loss"]["last"] > 0


@pytest.mark.parametrize("tied", [False, True])
def test_in_training_it_computes_what_it_does_else(tied):
    model = quantized_model("llama", embedding_bits=3, tie_word_embeddings=tied)
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens, use_cache=False).logits
    with tunable_tables(model) as parameters:
        assert len(parameters) == 4 * (1 if tied else 2)
        found = model(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        found.square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in parameters)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=2e-2, atol=2e-2)


def test_tokens_are_counted_in_all_of_a_text(tmp_path):
    """A few sequences are too few to tell which tokens are frequent."""
    tokenizer, file = tiny_tokenizer(), tmp_path / "text.txt"
    file.write_text(TEXT * 3)
    tokens = counted_tokens(tokenizer, CRVQConfig(dataset=str(file), nsamples=1, seqlen=8))
    assert torch.equal(tokens, torch.tensor(tokenizer(TEXT * 3)["input_ids"]))
    for dataset in ("self", None, [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}]):
        assert counted_tokens(tokenizer, CRVQConfig(dataset=dataset)) is None
    assert counted_tokens(None, CRVQConfig(dataset=str(file))) is None
