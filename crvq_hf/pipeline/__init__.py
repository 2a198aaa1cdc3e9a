"""Quantizing a whole model, block by block; decides nothing numerical about one layer.

`quantize_model` is the entry, `plan` says before it what it will need. `block_loop` leads `streams` of hidden states
through the blocks, each handed to `quantize_block`; then `tables` puts embedding and head in codes, which `table_fit`
finds. `run` is what these share; `block_state` and `fingerprint` make a killed run go on where it was.

Called by the quantizer, and by `commands`.
"""
