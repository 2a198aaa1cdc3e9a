"""Texts of datasets, streamed, and of chats, as the tokenizer's template has them."""

import json
import sys

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer

from crvq_hf import CRVQConfig
from crvq_hf.calibration.text import read_text
from crvq_hf.calibration.tokens import calibration_tokens
from crvq_hf.dataset import rows as reading
from crvq_hf.evaluation.perplexity import read_text_tokens
from crvq_hf.pipeline.fingerprint import dataset_fingerprint

datasets = pytest.importorskip("datasets")

LINES = TEXT.split("\n")
FIELDS = {"nsamples": 4, "seqlen": 16, "e2e_finetune_epochs": 0}
CHAT = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog."}]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset called acme/texts, of two splits, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # seconds, else 5
    for split, texts in (("train", LINES), ("test", ["other words"] * 90)):
        table = datasets.Dataset.from_list([{"n": n, "body": text, "url": "u"} for n, text in enumerate(texts)])
        table.to_parquet(tmp_path / f"acme/texts/data/{split}-00000-of-00001.parquet")
    return tmp_path / "acme/texts"


def tokens_of(model, tokenizer, dataset, **fields):
    return calibration_tokens(model, tokenizer, CRVQConfig(dataset=dataset, **FIELDS | fields))


def test_a_dataset_is_read_by_configuration_split_and_field(model, tokenizer, folder):
    train = tokens_of(model, tokenizer, "acme/texts:default:train:body")
    assert train.shape == (4, 16) and torch.equal(train, tokens_of(model, tokenizer, "acme/texts:body"))
    assert not torch.equal(train, tokens_of(model, tokenizer, "acme/texts:body", seed=1))
    words = tokenizer.decode(tokens_of(model, tokenizer, f"{folder}::test:body")[0])
    assert "other" in words and "fox" not in words
    before = dataset_fingerprint("acme/texts:body")
    (folder / "data/train-00001-of-00002.parquet").write_bytes(b"changed")
    assert dataset_fingerprint("acme/texts:body") not in (before, "acme/texts:body")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("acme/texts:", "acme/texts has the fields 'n', 'body', 'url'; say which of them holds the text"),
        ("acme/texts:title", "acme/texts has no field 'title'; it has 'n', 'body', 'url'"),
        ("acme/texts:n", "The field 'n' of acme/texts holds no text but int in row 1"),
        ("acme/texts:default:dev:body", r"acme/texts \(configuration default, split dev\) cannot be read .*'train'"),
        ("acme/texts:en:train:body", r"acme/texts \(configuration en, split train\) cannot be read"),
        ("nobody/nothing:text", r"The dataset nobody/nothing \(configuration default, split train\) cannot be read"),
    ],
)
def test_what_a_dataset_does_not_have(model, tokenizer, folder, dataset, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokens_of(model, tokenizer, dataset)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_no_more_of_the_hub_is_read_than_is_needed(model, tokenizer, monkeypatch):
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"text": f"{number} {LINES[number % len(LINES)]}"}

    def load_dataset(name, config, split, streaming):
        assert (name, config, split, streaming) == ("allenai/c4", "en", "train", True)
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(reading, "_MIXED_ROWS", 50)
    found = tokens_of(model, tokenizer, "allenai/c4:en:text", nsamples=20)
    assert found.shape == (20, 16) and len(read) < 200
    assert torch.equal(found, tokens_of(model, tokenizer, "allenai/c4:en:train:text", nsamples=20))


def test_a_dataset_without_the_package_that_reads_it(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="Reading allenai/c4 needs the package datasets"):
        tokens_of(model, tokenizer, "allenai/c4:en:text")


def write_chats(path, *conversations) -> str:
    path.write_text("".join(json.dumps({"id": 1, "talk": talk}) + "\n" for talk in conversations))
    return f"{path}:talk"


def test_chats_go_through_the_template(tmp_path, model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = write_chats(tmp_path / "chats.jsonl", *[CHAT] * 40)
    text = "\n\n".join(["<user>fox?<assistant>dog."] * 40)
    assert "".join(read_text(source, tokenizer)) == text
    expected = tokens_of(model, tokenizer, [text])
    assert torch.equal(tokens_of(model, tokenizer, source), expected)
    assert read_text_tokens(tokenizer, source).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat messages in row 1 of .*chats.jsonl, but the tokenizer has no chat template"),
        ("{{ raise_exception('no assistants') }}", "does not take the messages in row 1 of .* no assistants"),
    ],
)
def test_chats_that_no_template_takes(tmp_path, model, template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokens_of(model, tokenizer, write_chats(tmp_path / "chats.jsonl", CHAT))
