"""benchmarks/quality/embeddings.py: fewer bits of embeddings are a step away from dense ones, and each has a row."""

import csv

from tiny import TEXT, save_tiny

from benchmarks.quality import embeddings


def test_a_row_for_each_number_of_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "CODED_ON", 512)
    save_tiny(tmp_path / "dense")
    (tmp_path / "text").write_text(20 * TEXT)
    text = str(tmp_path / "text")
    options = ["--calibration", text, "--text", text, "--seqlen", "32", "--output", str(tmp_path)]
    embeddings.main([str(tmp_path / "dense"), *options, "--bits", "16", "8", "2"])
    rows = {float(row["bits"]): float(row["perplexity"]) for row in csv.DictReader(open(tmp_path / "embeddings.csv"))}
    assert len(rows) == 3 and rows[16] != rows[2] and abs(rows[8] / rows[16] - 1) < abs(rows[2] / rows[16] - 1)
