"""Quantizing a whole model, block by block; decides nothing numerical about one layer.

`quantize_model` is the entry. `calibration` makes tokens of what `text` reads, `samples` takes whatever
else a model is given, such as sound, and `block_loop` leads `streams` of
hidden states through the blocks, each handed to `quantize_block`. `run` is what these share; `block_state` and
`fingerprint` make a killed run go on where it was.

Called by the quantizer, and by `commands`.
"""
