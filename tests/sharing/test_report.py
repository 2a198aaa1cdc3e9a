"""The report of a run: what its numbers are, what its page and picture are made of, and that it tells no secrets."""

import base64
import builtins
import hashlib
import html
import html.parser
import io
import json
import math
import re
import shutil

import pytest
from made import SETTINGS, save_random
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from crvq_hf import CRVQConfig
from crvq_hf.checkpoint.breakdown import PARTS, break_down, shortest_endings
from crvq_hf.commands import convert
from crvq_hf.commands import quantize as measuring
from crvq_hf.commands.cli import main
from crvq_hf.evaluation.samples import PROMPTS
from crvq_hf.modeling.experts import find_fused_experts, unfuse_experts_
from crvq_hf.sharing import figures
from crvq_hf.sharing.report import command_line, draw_report, facts, read_quantized, shareable, write_report

VOID = {"meta", "img", "br"}


@pytest.fixture
def no_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


class Page(html.parser.HTMLParser):
    """Reads a page: its texts, its pictures, and that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.sources = [], [], []
        self.feed(text)
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def picture_of(folder) -> Image.Image:
    return Image.open(io.BytesIO((folder / "report.png").read_bytes()))


def errors_shown(monkeypatch) -> list:
    """Returns a list that gets the numbers of every picture drawn from now on."""
    shown, draw = [], figures._draw_errors
    monkeypatch.setattr(figures, "_draw_errors", lambda part, *args: shown.append(args[0]) or draw(part, *args))
    return shown


# The numbers


def test_every_stored_bit_is_counted_once(made):
    _, out = made
    info, report = read_quantized(out)
    numbers = break_down(info, report)
    tensors = load_file(out / "model.safetensors")
    names = [name.removesuffix(".weight_order") for name in tensors if name.endswith(".weight_order")]
    sizes = {
        part: sum(tensors[f"{name}.{tensor}"].nbytes for name in names)
        for part, tensor in zip(PARTS[2:], ("weight_codebooks", "weight_scale", "weight_order"), strict=True)
    }
    for part, nbytes in sizes.items():
        assert numbers.quantized_bytes[part] == nbytes
    # Codes of 4 bits for groups of 8 channels, and 3 extended ones for each of the one or more critical groups.
    rows = {name: len(tensors[f"{name}.weight_scale"]) for name in names}
    base = sum(rows[name] * len(tensors[f"{name}.weight_order"]) / 8 * 4 / 8 for name in names)
    assert numbers.quantized_bytes["codes"] == base
    codes = sum(tensors[f"{name}.weight"].nbytes for name in names)
    assert numbers.quantized_bytes["extended codes"] == codes - base > 0
    dense = sum(tensor.nbytes for name, tensor in tensors.items() if name.rpartition(".")[0] not in names)
    assert sum(numbers.dense_bytes.values()) == dense and next(iter(numbers.dense_bytes)) in (
        "lm_head",
        "embed_tokens",
    )
    assert numbers.file_bytes == (out / "model.safetensors").stat().st_size
    whole = sum(numbers.quantized_bytes.values()) * 8 / sum(layer.num_weights for layer in info.layers.values())
    assert whole == pytest.approx(report["bits_per_weight"])
    for block in range(2):  # both blocks are alike
        assert sum(numbers.block_bits[part][block] for part in PARTS) == pytest.approx(whole)


def test_embeddings_in_8_bits_have_their_row_and_bar(tmp_path):
    dense = save_tiny(tmp_path / "dense")
    config = CRVQConfig(dataset=str(dense / "text.txt"), embedding_bits=8, **SETTINGS | {"e2e_finetune_epochs": 1})
    convert.convert(str(dense), tmp_path / "out", config)
    info, report = read_quantized(tmp_path / "out")
    numbers = break_down(info, report)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert sum(nbytes for _, nbytes, _ in figures._bars_of_bytes(numbers)) == sum(t.nbytes for t in tensors.values())
    rows = facts(info, report, numbers)
    assert rows["stay dense"] == "0.0% of the weights of the blocks, 0.0% of all"
    assert f"{numbers.embedding_bytes:,} bytes" in rows["embeddings"] and "embeddings" not in rows["not quantized"]
    assert rows["calibration"] == f"32 tokens, {report['e2e_tokens']} for end-to-end fine-tuning"
    assert command_line(report) == (
        "crvq quantize dense OUT --nbits-per-codebook 4 --dataset text.txt --nsamples 2 --seqlen 16 --embedding-bits 8"
    )


def test_errors_stand_where_they_belong(made):
    _, out = made
    info, report = read_quantized(out)
    numbers = break_down(info, report)
    assert [kind.name for kind in numbers.kinds] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    assert numbers.blocks == [0, 1] and numbers.per_cell == 1
    for kind, row in zip(numbers.kinds, numbers.errors, strict=True):
        for block, error in enumerate(row):
            (name,) = (name for name in kind.layers if f"layers.{block}." in name)
            assert error == report["layers"][name]["relative_error"]
        assert kind.worst_error == report["layers"][kind.worst_layer]["relative_error"] == max(row)


def test_shortest_endings():
    assert shortest_endings(["attn.c_attn", "attn.c_proj", "mlp.c_proj"]) == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    assert shortest_endings(["norm", "final_norm", "block.norm"]) == ["norm", "final_norm", "block.norm"]
    assert shortest_endings([]) == []


def test_experts_are_taken_together(tmp_path, monkeypatch):
    fields = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    }
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", **fields, num_hidden_layers=3, mlp_only_layers=[0])
    model = AutoModelForCausalLM.from_config(config).eval()
    unfuse_experts_(model, list(find_fused_experts(model)[0]))
    save_random(tmp_path / "out", model, lambda block, index: 0.01 * index)
    shown = errors_shown(monkeypatch)
    draw_report(tmp_path / "out")
    (numbers,) = shown
    assert [kind.name for kind in numbers.kinds[4:]] == [
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "experts.gate_proj", "experts.up_proj", "experts.down_proj"
    ]  # fmt: skip
    assert numbers.per_cell == 6 and len(numbers.kinds[7].layers) == 12
    report = json.loads((tmp_path / "out/report.json").read_text())
    errors = [report["layers"][name]["relative_error"] for name in numbers.kinds[7].layers if "layers.2." in name]
    assert len(errors) == 6 and numbers.errors[7][2] == pytest.approx(sum(errors) / 6)
    assert math.isnan(numbers.errors[7][0]) and math.isnan(numbers.errors[4][1])


# Page and picture


def test_page_and_picture(made):
    _, out = made
    _, report = read_quantized(out)
    picture = picture_of(out)
    assert picture.format == "PNG" and 1000 < picture.width < 2000 and 700 < picture.height < 2000
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    (source,) = page.sources  # nothing is fetched from elsewhere
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (out / "report.png").read_bytes()
    text = page.text
    assert f"{report['bits_per_weight']:.4f}" in text and "not measured" in text
    assert command_line(report) in text and "model.layers.1.mlp.down_proj" in text
    assert command_line(report) == (
        "crvq quantize tiny-model OUT --nbits-per-codebook 4 --dataset text.txt --nsamples 2 --seqlen 16 "
        "--e2e-finetune-epochs 0"
    )


@pytest.mark.parametrize("blocks", [1, 80])
def test_any_depth_is_drawn(blocks, tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=blocks)
    shown = errors_shown(monkeypatch)
    draw_report(save_random(tmp_path / "out", model, lambda block, index: 0.1 if block else 0.0))
    assert shown[0].blocks == list(range(blocks))
    picture = picture_of(tmp_path / "out").convert("RGB")
    assert picture.height < 1500 and len(picture.resize((200, 200)).getcolors(40000)) > 20  # not a white sheet


def test_a_name_from_elsewhere_is_text_in_the_page(out):
    report = json.loads((out / "report.json").read_text())
    report["command"]["model"] = report["base_model"] = "<script>alert(1)</script>$x^$"
    (out / "report.json").write_text(json.dumps(report))
    draw_report(out)
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text
    Page(text)


def test_drawing_again_and_what_is_in_the_way(out, tmp_path, capsys):
    before = {name: (out / name).read_bytes() for name in ("report.html", "report.png")}
    for name in before:
        (out / name).unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "report.png")]
    assert {name: (out / name).read_bytes() for name in before} == before
    (out / "report.json").write_text("{}")
    assert main(["report", str(out)]) == 2
    assert "is damaged; remove it, or quantize again" in capsys.readouterr().err
    (out / "report.json").unlink()
    assert main(["report", str(out)]) == 2
    assert "has no report.json, so there is nothing to draw" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_without_text_the_errors_are_those_of_the_weights(made, tmp_path):
    with_text, without = made[1], save_random(tmp_path / "out", tiny_model())
    report = json.loads((without / "report.json").read_text()) | {"calibration_tokens": 0}
    write_report(without, report)
    assert "of a layer's output on the calibration tokens" in Page((with_text / "report.html").read_text()).text
    assert "of a layer's weights" in Page((without / "report.html").read_text()).text


def test_a_model_in_memory_has_one_too(tmp_path):
    folder = save_random(tmp_path / "out", tiny_model())
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").unlink()
    write_report(folder, report)
    assert json.loads((folder / "report.json").read_text()) == report and picture_of(folder)
    assert "crvq quantize" not in (folder / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_only_the_pictures_are_missing(made, tmp_path, no_matplotlib, capsys, caplog):
    dense, _ = made
    arguments = ["quantize", str(dense), str(tmp_path / "out"), "--dataset", "none", "--nbits-per-codebook", "4"]
    assert main(arguments) == 0
    hints = [line for line in capsys.readouterr().err.splitlines() if "crvq-hf[report]" in line]
    assert len(hints) == 1 and f"crvq report {tmp_path / 'out'} draws it" in hints[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "report.json" in names and not names & {"report.png", "report.html"}
    assert main(["report", str(tmp_path / "out")]) == 2
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_picture_that_cannot_be_saved_costs_nothing(made, tmp_path, monkeypatch, caplog):
    dense, _ = made

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crvq_hf.sharing.report.draw", full)
    convert.convert(str(dense), tmp_path / "out", CRVQConfig(dataset=None, **SETTINGS))
    assert "No space left on device" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out/report.json").is_file()


# What may be told


def test_nothing_of_the_users_folders_is_written(made):
    dense, out = made
    for path in out.iterdir():
        assert str(dense.parent).encode() not in path.read_bytes(), path
    command = json.loads((out / "report.json").read_text())["command"]
    assert command["model"] == "tiny-model" and command["config"]["dataset"] == "text.txt"


@pytest.mark.parametrize(
    ("model", "dataset", "base_model", "shown", "text"),
    [
        ("org/base", "wikitext2", "org/base", "org/base", "wikitext2"),
        ("gpt2", None, "gpt2", "gpt2", None),
        ("/home/me/org/base", "/home/me/diary.txt", None, "base", "diary.txt"),
        ("/home/me/base/", ["my", "diary"], None, "base", "2 texts"),
        ("/c/hub/models--org--a--b/snapshots/0123abc", "self", "org/a--b", "org/a--b", "self"),
    ],
)
def test_shareable(model, dataset, base_model, shown, text):
    report = {"command": {"model": model, "gguf_file": None, "config": {"dataset": dataset}}, "layers": {}}
    found = shareable(report)
    assert found["base_model"] == base_model
    assert found["command"] == {"model": shown, "gguf_file": None, "config": {"dataset": text}}
    assert report["command"]["model"] == model and shareable(found) == found


def test_models_of_one_name_in_two_folders_are_told_apart(made, tmp_path, capsys):
    dense, _ = made
    other = shutil.copytree(dense, tmp_path / dense.name)
    config = CRVQConfig(dataset=None, **SETTINGS)
    convert.convert(str(dense), tmp_path / "out", config)
    convert.convert(str(dense), tmp_path / "out", config)
    with pytest.raises(ValueError, match=r"result of another command \(tiny-model"):
        convert.convert(str(other), tmp_path / "out", config)


# Perplexity


def test_evaluate_measures_before_and_after(made, tmp_path, capsys, monkeypatch):
    dense, _ = made
    text, out = dense / "text.txt", tmp_path / "out"
    quantize = ["quantize", str(dense), str(out), "--dataset", "none", "--nbits-per-codebook", "4", "--device", "cpu"]
    evaluate = ["--evaluate", str(text), "--evaluate-seqlen", "32", "--evaluate-windows", "3"]
    assert main([*quantize, *evaluate]) == 0
    printed = capsys.readouterr().out
    evaluation = json.loads((out / "report.json").read_text())["evaluation"]
    assert evaluation["text"] == "text.txt" and str(dense) not in json.dumps(evaluation)
    assert evaluation["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (evaluation["windows"], evaluation["seqlen"], evaluation["tokens"]) == (3, 32, 93)
    assert evaluation["command"] == "crvq eval MODEL --text text.txt --seqlen 32 --windows 3"
    words = evaluation["command"].replace("text.txt", str(text)).split()[1:]
    for when, folder in (("before", dense), ("after", out)):
        assert main([str(folder) if word == "MODEL" else word for word in words] + ["--json", "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["value"] == evaluation[when]["value"]
    assert [sample["prompt"] for sample in evaluation["samples"]] == list(PROMPTS)
    page = (out / "report.html").read_text()
    for sample in evaluation["samples"]:
        assert sample["before"] and html.escape(sample["before"]) in page and html.escape(sample["after"]) in page
    assert any(sample["before"] != sample["after"] for sample in evaluation["samples"])
    values = evaluation["before"]["value"], evaluation["after"]["value"]
    assert values[0] != values[1] and "{:.4f} before, {:.4f} after".format(*values) in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{value:.2f}</td>" in page for value in values) and "not measured" not in page

    # The same again has nothing to do; other windows are measured without quantizing again.
    with monkeypatch.context() as context:
        context.setattr(measuring, "_measure", None)
        context.setattr(convert, "quantize_model", None)
        assert main([*quantize, *evaluate]) == 0
    with monkeypatch.context() as context:
        context.setattr(convert, "quantize_model", None)
        assert main([*quantize, *evaluate[:-1], "2"]) == 0
    assert json.loads((out / "report.json").read_text())["evaluation"]["windows"] == 2
    assert json.loads((out / "report.json").read_text())["evaluation"]["before"] != evaluation["before"]


def test_a_measurement_that_was_interrupted_is_made_up_for(made, tmp_path, monkeypatch):
    dense, _ = made
    out, config = tmp_path / "out", CRVQConfig(dataset=None, **SETTINGS)
    wanted, measure_one = measuring.Measurement(str(dense / "text.txt"), 32, 2), measuring._measure

    def stop_after_quantizing(source, *args):
        if source == str(out):
            raise KeyboardInterrupt
        return measure_one(source, *args)

    with monkeypatch.context() as context:
        context.setattr(measuring, "_measure", stop_after_quantizing)
        with pytest.raises(KeyboardInterrupt):
            measuring.convert_and_measure(str(dense), out, config, None, wanted)
    assert "evaluation" not in json.loads((out / "report.json").read_text())
    monkeypatch.setattr(convert, "quantize_model", None)
    assert measuring.convert_and_measure(str(dense), out, config, None, wanted)["evaluation"]["windows"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate", "none.txt"], "is no file"),
        (["--evaluate", "TEXT", "--evaluate-seqlen", "4096"], "from 2 to the 128 tokens"),
        (["--evaluate", "TEXT", "--evaluate-seqlen", "32", "--evaluate-windows", "0"], "windows must be at least 1"),
    ],
)
def test_a_text_that_cannot_be_used_is_told_before_the_work(made, tmp_path, monkeypatch, capsys, options, message):
    dense, _ = made
    monkeypatch.setattr(convert, "quantize_model", None)
    options = [str(dense / "text.txt") if option == "TEXT" else option for option in options]
    assert main(["quantize", str(dense), str(tmp_path / "out"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
