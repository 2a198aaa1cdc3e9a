"""What a `dataset` may be called: one grammar, and files that are there by the exact name come first."""

import pytest

from crvq_hf import CRVQConfig
from crvq_hf.calibration.tokens import check_dataset
from crvq_hf.dataset.grammar import Source, shareable_dataset, sources_of
from crvq_hf.pipeline.fingerprint import dataset_fingerprint


def source(kind, name, field=None, config=None, split=None, share=1.0) -> Source:
    return Source(kind, name, field, config, split, share)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("self", source("self", "self")),
        ("c4", source("optimum", "c4")),
        ("missing.txt", source("file", "missing.txt")),
        ("data/missing.jsonl:body", source("file", "data/missing.jsonl:body")),
        ("allenai/c4", source("dataset", "allenai/c4")),
        ("allenai/c4:body", source("dataset", "allenai/c4", "body")),
        ("allenai/c4:en:text", source("dataset", "allenai/c4", "text", "en")),
        ("allenai/c4:en:validation:text", source("dataset", "allenai/c4", "text", "en", "validation")),
        ("a-b/c.d_1::train_sft:messages", source("dataset", "a-b/c.d_1", "messages", None, "train_sft")),
        ("allenai/c4:en:train:", source("dataset", "allenai/c4", None, "en", "train")),
        ("C:\\texts\\a.txt", source("file", "C:\\texts\\a.txt")),
        ("/no/where", source("file", "/no/where")),
    ],
)
def test_one_source(dataset, expected):
    assert sources_of(dataset) == [expected]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("a.txt:0.7,b.txt:0.3", [source("file", "a.txt", share=0.7), source("file", "b.txt", share=0.3)]),
        ("a.txt:7, self:3", [source("file", "a.txt", share=7), source("self", "self", share=3)]),
        (
            "allenai/c4:en:text:.5,C:\\a,b.txt:2",
            [source("dataset", "allenai/c4", "text", "en", share=0.5), source("file", "C:\\a,b.txt", share=2)],
        ),
        ("a.txt:0.7,b.txt", [source("file", "a.txt:0.7,b.txt")]),
        ("a.txt:0.7", [source("file", "a.txt:0.7")]),
    ],
)
def test_mixtures(dataset, expected):
    assert sources_of(dataset) == expected


def test_files_that_are_there_by_the_exact_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("self", "a:1,b:2", "t.jsonl", "t.jsonl:body", "x:0.5,y.txt", "z.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "allenai").mkdir()
    (tmp_path / "allenai/c4").write_text("text")
    for name in ("self", "a:1,b:2", "t.jsonl:body", "allenai/c4", "x:0.5,y.txt"):
        assert sources_of(name) == [source("file", name)]
    assert sources_of("t.jsonl:text") == [source("file", "t.jsonl", "text")]
    mixed = sources_of("x:0.5,y.txt:0.25,z.txt:0.5,t.jsonl:text:0.25")
    assert [(one.spelled, one.share) for one in mixed] == [
        ("x:0.5,y.txt", 0.25),
        ("z.txt", 0.5),
        ("t.jsonl:text", 0.25),
    ]


@pytest.mark.parametrize("dataset", ["a.txt:0,b.txt:1", f"a.txt:1,b.txt:{'9' * 400}"])
def test_shares_are_positive_numbers(dataset):
    with pytest.raises(ValueError, match="shares that are not greater than 0; give such as 0.7 and 0.3"):
        sources_of(dataset)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"'.*missing.txt' is no file; give the path") as caught:
        check_dataset(f"{tmp_path}/a.txt:0.5,{tmp_path}/missing.txt:0.5")
    assert "owner/name:config:split:field" in str(caught.value) and "a.txt:0.7,b.txt:0.3" in str(caught.value)
    check_dataset("allenai/c4:en:train:text")  # that is asked for later


def test_paths_are_not_told_and_contents_tell_runs_apart(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("one")
    other.write_text("other")
    mixture = f"{one}:0.25,{other}:0.75,allenai/c4:en:text:1"
    assert shareable_dataset(mixture) == "one.txt:0.25,other.txt:0.75,allenai/c4:en:text:1"
    assert CRVQConfig(dataset=mixture).dataset == mixture
    found = [dataset_fingerprint(mixture.replace("0.25", share)) for share in ("0.25", "0.5")]
    found.append(dataset_fingerprint(mixture.replace(":en:", ":de:")))
    one.write_text("changed")
    assert len({*found, dataset_fingerprint(mixture)}) == 4 and not any(str(tmp_path) in text for text in found)
    assert dataset_fingerprint("allenai/c4:en:text") == "allenai/c4:en:text"
    assert shareable_dataset("allenai/c4:en:text") == "allenai/c4:en:text"
