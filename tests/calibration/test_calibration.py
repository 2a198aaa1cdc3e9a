"""Calibration tokens: every source of text, determinism, and a sentence for everything that cannot work."""

import random

import numpy
import optimum.gptq.data
import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from crvq_hf import CRVQConfig
from crvq_hf.calibration import tokens as calibration
from crvq_hf.calibration.tokens import calibration_tokens, num_sequences

pytestmark = pytest.mark.usefixtures("precision", "quiet")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def config(**fields) -> CRVQConfig:
    return CRVQConfig(**{"nsamples": 5, "seqlen": 16, "e2e_finetune_epochs": 0} | fields)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and len(message) < 500


def all_tokens(tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def windows_of(tokens: list[int], seqlen: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + seqlen]) for i in range(0, len(tokens) - seqlen + 1, seqlen)]


def test_nothing(model, tokenizer):
    assert calibration_tokens(model, None, config(dataset=None)) is None
    assert calibration_tokens(model, tokenizer, config(dataset=None, seqlen=10**6)) is None


def test_windows_of_a_file_are_from_the_text_and_do_not_overlap(model, tokenizer, file):
    tokens = calibration_tokens(model, tokenizer, config(dataset=file))
    assert tokens.shape == (5, 16) and tokens.dtype == torch.int64 and tokens.device.type == "cpu"
    everything = windows_of(all_tokens(tokenizer), 16)
    assert len(set(everything)) == len(everything)  # or the next line could not tell
    drawn = [tuple(row) for row in tokens.tolist()]
    assert set(drawn) <= set(everything) and len(set(drawn)) == 5


def test_all_windows_can_be_asked_for(model, tokenizer, file):
    everything = windows_of(all_tokens(tokenizer), 16)
    tokens = calibration_tokens(model, tokenizer, config(dataset=file, nsamples=len(everything)))
    assert sorted(map(tuple, tokens.tolist())) == sorted(everything)
    with pytest.raises(ValueError, match="give more text or lower nsamples or seqlen"):
        calibration_tokens(model, tokenizer, config(dataset=file, nsamples=len(everything) + 1))


@pytest.mark.parametrize(
    ("fields", "available", "expected"),
    [
        ({"e2e_finetune_epochs": 0, "e2e_nsamples": 9}, None, 5),
        ({"e2e_nsamples": 9}, None, 9),
        ({"e2e_nsamples": 9}, 7, 9),  # asked for, so told when the text is too short
        ({"e2e_nsamples": 3}, None, 5),
        ({}, None, 30),
        ({}, 7, 7),
        ({}, 3, 5),
    ],
    ids=str,
)
def test_as_many_sequences_as_the_hungriest_step_wants(fields, available, expected):
    assert num_sequences(config(**{"e2e_finetune_epochs": 1} | fields), available) == expected


def test_end_to_end_fine_tuning_has_the_sequences_of_the_blocks_and_more(model, tokenizer, file):
    few = calibration_tokens(model, tokenizer, config(dataset=file))
    more = calibration_tokens(model, tokenizer, config(dataset=file, e2e_finetune_epochs=1, e2e_nsamples=9))
    assert more.shape == (9, 16) and torch.equal(more[:5], few)
    with pytest.raises(ValueError, match=r"e2e_nsamples=9999 of seqlen=16 need .* lower e2e_nsamples or seqlen"):
        calibration_tokens(model, tokenizer, config(dataset=file, e2e_finetune_epochs=1, e2e_nsamples=9999))


def test_a_list_of_texts(model, tokenizer):
    lines = TEXT.split("\n")
    tokens = calibration_tokens(model, tokenizer, config(dataset=lines))
    everything = windows_of(all_tokens(tokenizer, "\n\n".join(lines)), 16)
    assert {tuple(row) for row in tokens.tolist()} <= set(everything)


@pytest.mark.parametrize("dataset", ["file", "self"])
def test_the_seed_decides(model, tokenizer, file, dataset):
    dataset = str(file) if dataset == "file" else dataset
    first, again, other = (
        calibration_tokens(model, tokenizer, config(dataset=dataset, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dataset", ["file", "self"])
def test_random_states_are_left_alone(model, tokenizer, file, dataset):
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    calibration_tokens(model, tokenizer, config(dataset=str(file) if dataset == "file" else dataset))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_text_written_by_the_model(model):
    tokens = calibration_tokens(model, None, config(dataset="self", nsamples=40))
    assert tokens.shape == (40, 16) and tokens.dtype == torch.int64
    assert (tokens[:, 0] == model.config.bos_token_id).all()
    assert tokens.min() >= 0 and tokens.max() < 300
    assert len(tokens.unique(dim=0)) == 40
    # What it writes is likely to itself: more than a random row is.
    with torch.no_grad():
        losses = [float(model(rows, labels=rows).loss) for rows in (tokens, torch.randint(300, (40, 16)))]
    assert losses[0] < losses[1]


@pytest.mark.parametrize(("free", "moves"), [(10**9, ["meta", "cpu"]), (1000, [])])
def test_a_model_writes_on_the_device_if_it_fits_there(model, monkeypatch, free, moves):
    went = []
    monkeypatch.setattr(calibration.distributed, "free_memory_bytes", lambda device: free)
    monkeypatch.setattr(model, "to", lambda device: went.append(device.type))
    with pytest.raises(KeyError), calibration.moved_if_it_fits(model, torch.device("meta")):
        assert went == moves[:1]
        raise KeyError
    assert went == moves


def test_text_of_a_model_without_start_token():
    model = tiny_model(bos_token_id=None)
    tokens = calibration_tokens(model, None, config(dataset="self", nsamples=20))
    assert tokens.shape == (20, 16) and len(tokens[:, 0].unique()) > 5


def test_text_of_a_model_whose_start_token_is_not_in_its_vocabulary():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    assert model.config.bos_token_id == 50256
    tokens = calibration_tokens(model, None, config(dataset="self"))
    assert tokens.shape == (5, 16) and tokens.max() < 64


def test_an_end_token_ends_nothing():
    """After it the model goes on with another text."""
    model = tiny_model()
    plain = calibration_tokens(model, None, config(dataset="self"))
    model.config.eos_token_id = model.generation_config.eos_token_id = sorted(set(plain[:, 5].tolist()))
    assert torch.equal(calibration_tokens(model, None, config(dataset="self")), plain)


def test_text_of_one_token(model):
    assert calibration_tokens(model, None, config(dataset="self", seqlen=1)).tolist() == [[0]] * 5


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.2, "top_k": 1, "top_p": 0.1, "repetition_penalty": 2.0},
        {"min_p": 0.5},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_settings_for_chatting_do_not_shape_the_text(model, settings):
    plain = calibration_tokens(model, None, config(dataset="self"))
    before = model.generation_config
    try:
        model.generation_config = type(before).from_dict(before.to_dict() | settings)
        assert torch.equal(calibration_tokens(model, None, config(dataset="self")), plain)
        assert all(getattr(model.generation_config, key) == value for key, value in settings.items())
    finally:
        model.generation_config = before


def test_sequences_longer_than_the_model_takes(model, tokenizer, file):
    for dataset in (str(file), "self", "wikitext2"):
        with pytest.raises(ValueError) as caught:
            calibration_tokens(model, tokenizer, config(dataset=dataset, seqlen=129))
        assert str(caught.value) == "seqlen=129 is more than the 128 tokens the model takes; lower seqlen."
    assert calibration_tokens(model, None, config(dataset="self", nsamples=1, seqlen=128)).shape == (1, 128)


def test_a_model_that_takes_any_number_of_tokens(model, tokenizer, file, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", -1)  # as XLNet's config says it
    assert calibration_tokens(model, tokenizer, config(dataset=str(file), nsamples=1, seqlen=129)).shape[1] == 129


def test_too_little_text(model, tokenizer):
    with pytest.raises(ValueError) as caught:
        calibration_tokens(model, tokenizer, config(dataset=["the quick brown fox"]))
    message, length = str(caught.value), len(all_tokens(tokenizer, "the quick brown fox"))
    assert f"has {length} tokens" in message and "need 80" in message and is_one_sentence(message)


@pytest.mark.parametrize("texts", [[""], ["", " \n"]], ids=["empty", "blank"])
def test_empty_text(model, tokenizer, texts):
    with pytest.raises(ValueError, match="The calibration text is empty") as caught:
        calibration_tokens(model, tokenizer, config(dataset=texts))
    assert is_one_sentence(str(caught.value))


def test_an_empty_file(model, tokenizer, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="The calibration text is empty"):
        calibration_tokens(model, tokenizer, config(dataset=tmp_path / "empty.txt"))


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_no_such_file(model, tokenizer, tmp_path, what):
    path = tmp_path if what == "folder" else tmp_path / "missing.txt"
    with pytest.raises(ValueError) as caught:
        calibration_tokens(model, tokenizer, config(dataset=path))
    message = str(caught.value)
    problem = "a folder without sound files" if what == "folder" else "no file"
    assert f"{str(path)!r} is {problem}" in message and is_one_sentence(message)
    assert "'wikitext2', 'c4', 'self'" in message


def test_a_file_that_is_no_text(model, tokenizer, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError) as caught:
        calibration_tokens(model, tokenizer, config(dataset=path))
    assert "model.bin is not UTF-8 text" in str(caught.value) and "at byte 3" in str(caught.value)
    assert is_one_sentence(str(caught.value))


@pytest.mark.parametrize("dataset", [["some text"], "wikitext2", "c4"], ids=["list", "wikitext2", "c4"])
def test_text_without_tokenizer(model, dataset):
    with pytest.raises(ValueError, match="is text and needs a tokenizer; pass tokenizer="):
        calibration_tokens(model, None, config(dataset=dataset))


def test_the_message_does_not_repeat_the_text(model):
    with pytest.raises(ValueError) as caught:
        calibration_tokens(model, None, config(dataset=[TEXT]))
    assert len(str(caught.value)) < 200


@pytest.fixture
def hub(monkeypatch):
    """Puts a function in the place of optimum's loader of hub datasets; returns the list of its calls."""
    calls = []

    def install(answer):
        def get_dataset(name, tokenizer, **fields):
            calls.append((name, fields))
            random.seed(fields["seed"])
            numpy.random.seed(fields["seed"])
            torch.manual_seed(fields["seed"])
            return answer(fields)

        monkeypatch.setattr(optimum.gptq.data, "get_dataset", get_dataset)
        return calls

    return install


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_dataset_of_the_hub(model, tokenizer, hub, name):
    rows = torch.arange(80).view(5, 1, 16)
    calls = hub(lambda fields: [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    tokens = calibration_tokens(model, tokenizer, config(dataset=name, seed=7))
    assert torch.equal(tokens, torch.arange(80).view(5, 16))
    assert calls == [(name, {"nsamples": 5, "seqlen": 16, "seed": 7, "split": "train"})]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), OSError("offline"), NameError("load_dataset")]
)
def test_no_hub(model, tokenizer, hub, error):
    def fail(fields):
        raise error

    hub(fail)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    with pytest.raises(ValueError) as caught:
        calibration_tokens(model, tokenizer, config(dataset="wikitext2"))
    message = str(caught.value)
    assert "dataset='wikitext2' could not be loaded from the hub" in message and type(error).__name__ in message
    assert "dataset='self'" in message and is_one_sentence(message)
    assert caught.value.__cause__ is error
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_a_file_named_like_a_dataset_is_that_file(model, tokenizer, tmp_path, monkeypatch, hub):
    calls = hub(lambda fields: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text(TEXT, encoding="utf-8")
    assert calibration_tokens(model, tokenizer, config(dataset="c4")).shape == (5, 16)
    assert not calls


def write_words(folder, **lengths) -> None:
    """Writes files of one word each, named after it."""
    for word, length in lengths.items():
        (folder / f"{word}.txt").write_text(f"{word} " * length)


def shares_of(tokens, tokenizer) -> list[str]:
    """Returns of which file each sequence is."""
    texts = [tokenizer.decode(row) for row in tokens]
    return [next(word for word in ("fox", "dog", "jugs") if word in text) for text in texts]


def test_a_mixture_by_shares_of_sequences(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path, fox=4000, dog=4000, jugs=4000)
    mixture = "fox.txt:0.5,dog.txt:0.3,jugs.txt:0.2"
    tokens = calibration_tokens(model, tokenizer, config(dataset=mixture, nsamples=20, e2e_finetune_epochs=1))
    words = shares_of(tokens, tokenizer)
    assert len(words) == 120  # as many as end-to-end fine-tuning wants
    for number in (10, 20, 50, 120):  # the blocks take the first of them
        assert [words[:number].count(word) / number for word in ("fox", "dog", "jugs")] == [0.5, 0.3, 0.2]
    assert torch.equal(tokens, calibration_tokens(model, tokenizer, config(dataset=mixture, nsamples=120)))
    with_self = calibration_tokens(model, tokenizer, config(dataset="self:1,fox.txt:3", nsamples=8))
    assert ["fox" in tokenizer.decode(row) for row in with_self].count(True) == 6


def test_a_mixture_one_of_whose_texts_is_short(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path, fox=4000, dog=100)
    fields = {"dataset": "fox.txt:0.75,dog.txt:0.25", "nsamples": 8}
    available = len(all_tokens(tokenizer, "dog " * 100)) // 16
    tokens = calibration_tokens(model, tokenizer, config(**fields, e2e_finetune_epochs=1))
    words = shares_of(tokens, tokenizer)
    assert words.count("dog") == available and 3 * available <= words.count("fox") <= 3 * available + 3
    with pytest.raises(
        ValueError, match=r"dog.txt has \d+ tokens, but nsamples=80 of seqlen=16 with a share of 0.25 need"
    ):
        calibration_tokens(model, tokenizer, config(**fields | {"nsamples": 80}))


def test_thousands_of_sequences(model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 120)
    tokens = calibration_tokens(model, tokenizer, config(dataset=tmp_path / "text.txt", nsamples=4000))
    assert tokens.shape == (4000, 16)
