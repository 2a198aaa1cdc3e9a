"""The blocks of a model: finding them, and running them one at a time.

`finding` has the lists of blocks and watches their layers, `runner` runs them on what the model itself hands them, in
`trees` of tensors, and `rehearsal` compares that with the whole model before any work.

Called by everything that goes through a model block by block; knows nothing of quantized layers.
"""
