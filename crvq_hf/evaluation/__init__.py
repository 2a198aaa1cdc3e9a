"""How good and how fast a model is, quantized or not.

`perplexity` measures on a text, and the tokens written per second; `agreement` compares two models on a text;
`samples` lets a model write; `tasks` runs the lm-evaluation-harness.

Called by `commands`, and by the benchmarks.
"""
