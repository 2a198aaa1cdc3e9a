"""Which layers of a model are quantized, and with how many bits; decided before any work.

`choice` is the entry: what the config says, less what a `trial` run of the model shows to have to stay dense, within a
`budget` of bits, or a `size` of the whole checkpoint. `stacked_weights` finds parameters that hold many weights, by a
trial run too.

Called by `pipeline` and `commands`.
"""
