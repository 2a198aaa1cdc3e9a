"""Training what is continuous in a quantized model: codebooks, row scales, norms and biases (CRVQ section 3.4).

`block` fits one block to the full-precision hidden states, `end_to_end` the whole model to the full-precision logits.
Both train layers as `tunable` makes them, `end_to_end` also embedding and head as `tables` does, with the optimizer of
`trainer`, on one of the `losses`.

Called by `pipeline` alone.
"""
