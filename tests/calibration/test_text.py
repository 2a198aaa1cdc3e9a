"""Text of every kind to tokens: what is read, how much of it, and a sentence for what cannot be."""

import gzip
import json
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer

from crvq_hf import CRVQConfig
from crvq_hf.calibration import text as reading
from crvq_hf.calibration.text import drawn_tokens, first_tokens, read_text
from crvq_hf.calibration.tokens import calibration_tokens
from crvq_hf.dataset.grammar import shareable_dataset, split_field
from crvq_hf.evaluation.perplexity import perplexity, read_text_tokens
from crvq_hf.pipeline.fingerprint import run_fingerprint

LINES = TEXT.split("\n")
ROWS = [{"id": number, "text": line, "tags": [1]} for number, line in enumerate(LINES)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def counted(tokenizer):
    """A tokenizer that counts the characters it is given."""

    def tokenize(text, **options):
        tokenize.characters += len(text)
        return tokenizer(text, **options)

    tokenize.characters = 0
    return tokenize


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write_table(folder: Path, name: str, rows: list[dict]) -> str:
    path, suffixes = folder / name, Path(name).suffixes
    if ".parquet" in suffixes:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    elif ".json" in suffixes:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        if suffixes[0] in (".csv", ".tsv"):
            comma = "," if suffixes[0] == ".csv" else "\t"
            quoted = [[f'"{value}"' for value in row.values()] for row in rows]
            lines = [comma.join(line) for line in [list(rows[0]), *quoted]]
        content = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["t.json", "t.jsonl", "t.ndjson", "t.csv", "t.tsv", "t.parquet", "t.jsonl.gz", "T.JSONL", "a [1]*::x.jsonl"],
)
def test_tables_give_the_texts_of_their_field_and_no_syntax(tmp_path, name):
    pytest.importorskip("datasets")
    rows = [row | {"body": row["text"].upper()} for row in ROWS]
    path = write_table(tmp_path, name, rows)
    assert "".join(read_text(path)) == "\n\n".join(LINES)
    assert "".join(read_text(f"{path}:body")) == "\n\n".join(LINES).upper()


def test_a_table_is_read_where_no_links_can_be_made(tmp_path, monkeypatch):
    pytest.importorskip("datasets")

    def refuse(self, target):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert "".join(read_text(write_table(tmp_path, "a [1].csv", ROWS))) == "\n\n".join(LINES)


def test_the_only_field_of_texts_needs_no_name_and_empty_rows_are_left_out(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"n": 1, "body": "one"}, {"n": 2, "body": None}, {"n": 3, "body": ""}, {"n": 4, "body": "four"}]
    assert "".join(read_text(write_table(tmp_path, "t.jsonl", rows))) == "one\n\nfour"
    (tmp_path / "list.json").write_text('["one", "two"]')
    assert "".join(read_text(str(tmp_path / "list.json"))) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('{"a": "x", "b": "y"}', "", "has the fields 'a', 'b'; say which of them holds the text"),
        ('{"text": "x"}', ":body", "has no field 'body'; it has 'text'"),
        ('{"text": "x", "n": 5}', ":n", "'n' of .* holds no text but int in row 1"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "", "has the fields 'messages'; say which"),
        ('{"text": "x"}\n{"text": ', "", "cannot be read as json .* repair it, or rename it to .txt"),
        ("once upon a time", "", "cannot be read as json"),
    ],
)
def test_a_table_without_such_texts_is_refused(tmp_path, content, field, message):
    pytest.importorskip("datasets")
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_text(f"{path}{field}"))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_table_without_the_package_that_reads_it(tmp_path, monkeypatch):
    path = write_table(tmp_path, "t.jsonl", ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets; install it with pip install 'crvq-hf\[datas"):
        list(read_text(path))


def test_calibration_and_perplexity_read_tables(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    path = write_table(tmp_path, "t.jsonl", [{"body": line, "n": 1} for line in LINES])
    fields = {"nsamples": 3, "seqlen": 16, "e2e_finetune_epochs": 0}
    of_list = calibration_tokens(tiny_model(), tokenizer, CRVQConfig(dataset=LINES, **fields))
    of_table = calibration_tokens(tiny_model(), tokenizer, CRVQConfig(dataset=f"{path}:body", **fields))
    assert torch.equal(of_list, of_table)
    assert read_text_tokens(tokenizer, f"{path}:body").tolist() == tokens_of(tokenizer, "\n\n".join(LINES))
    with pytest.raises(ValueError, match="is no table, so it has no field 'body'"):
        (tmp_path / "plain.txt").write_text(TEXT)
        calibration_tokens(tiny_model(), tokenizer, CRVQConfig(dataset=f"{tmp_path}/plain.txt:body", **fields))


def test_a_field_is_no_part_of_the_path(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    path = write_table(tmp_path / "private", "t.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert split_field(f"{path}:body") == (path, "body") and split_field("c4") == ("c4", None)
    assert shareable_dataset("private/t.jsonl:body") == "t.jsonl:body"
    first, other = (run_fingerprint(tiny_model(), None, CRVQConfig(dataset=f"{path}{end}")) for end in ("", ":body"))
    Path(path).write_text('{"text": "other"}')
    changed = run_fingerprint(tiny_model(), None, CRVQConfig(dataset=path))
    assert len({first["dataset"], other["dataset"], changed["dataset"]}) == 3


def test_pieces_of_a_file_are_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_READ", 7)
    path = tmp_path / "text.txt"
    path.write_bytes("naïve – 日本語\r\n😀 end".encode())
    assert "".join(read_text(str(path))) == "naïve – 日本語\n😀 end"
    path.write_bytes(b"good text " * 5 + b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text .* at byte 50"):
        list(read_text(str(path)))


@pytest.mark.parametrize("most", [1, 100, 5000, None])
def test_the_first_tokens_are_those_of_the_whole_text(tokenizer, most):
    whole = tokens_of(tokenizer, TEXT)
    found = first_tokens(tokenizer, (TEXT[i : i + 50] for i in range(0, len(TEXT), 50)), most)
    assert found.dtype == torch.int64 and found.tolist()[:most] == whole[:most]


def test_no_more_is_tokenized_than_is_needed(tokenizer, counted, tmp_path):
    text = TEXT * 500
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert len(read_text_tokens(counted, path, 64)) == 64 and counted.characters < 10_000
    counted.characters = 0
    config = CRVQConfig(dataset=path, nsamples=4, seqlen=16, e2e_finetune_epochs=0)
    assert calibration_tokens(tiny_model(), counted, config).shape == (4, 16)
    assert len(text) > 1_500_000 and counted.characters < 10_000


def test_drawn_tokens_come_from_all_over_the_text(tokenizer, monkeypatch):
    monkeypatch.setattr(reading, "_WHOLE", 0)
    whole = tokens_of(tokenizer, TEXT)
    found, is_all = drawn_tokens(tokenizer, TEXT, len(whole), 64, 0)
    assert is_all and found.tolist() == whole
    few = [drawn_tokens(tokenizer, TEXT, 100, 64, seed) for seed in (0, 0, 1, 2, 3)]
    assert all(100 <= len(tokens) < len(whole) and not all_of_it for tokens, all_of_it in few)
    assert torch.equal(few[0][0], few[1][0]) and len({tuple(tokens.tolist()) for tokens, _ in few}) > 1
    assert reading._cut("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]


def test_a_text_is_drawn_alike_however_it_is_read(tokenizer, monkeypatch):
    monkeypatch.setattr(reading, "_WHOLE", 100)
    for most, step in ((50, 1), (300, 37), (10**6, 5000)):
        parts = [TEXT[i : i + step] for i in range(0, len(TEXT), step)]
        expected, all_of_it = drawn_tokens(tokenizer, TEXT, most, 8, 3)
        found, is_all = drawn_tokens(tokenizer, partial(iter, parts), most, 8, 3)
        assert torch.equal(found, expected) and is_all == all_of_it == (most == 10**6)


def test_a_long_text_is_not_held(tokenizer):
    def read():
        return (TEXT for _ in range(3000))

    tracemalloc.start()
    found, is_all = drawn_tokens(tokenizer, read, 2000 * 16, 16, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) >= 2000 * 16 and not is_all
    assert len(TEXT) * 3000 > 10e6 and peak < 3e6


def test_tokens_of_another_model_are_refused(tokenizer):
    model = tiny_model(vocab_size=200)
    tokens = torch.tensor(tokens_of(tokenizer, TEXT))
    config = CRVQConfig(dataset=[TEXT], nsamples=3, seqlen=16, e2e_finetune_epochs=0)
    for measure in (lambda: calibration_tokens(model, tokenizer, config), lambda: perplexity(model, tokens, 16)):
        with pytest.raises(ValueError, match=r"gives token \d+, but the embedding of LlamaForCausalLM has 200 rows"):
            measure()


def test_windows_are_as_long_as_the_model_and_the_text_allow(tokenizer):
    tokens = torch.tensor(tokens_of(tokenizer, TEXT))
    assert perplexity(tiny_model(), tokens, windows=2, progress=False).seqlen == 128
    assert perplexity(tiny_model(), tokens[:50], progress=False).seqlen == 50
    assert perplexity(tiny_model(max_position_embeddings=4096), tokens, windows=1, progress=False).seqlen > 500
