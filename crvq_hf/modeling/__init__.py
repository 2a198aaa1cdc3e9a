"""What a quantized model is made of: modules, and how they come into a model.

`linear` is the CRVQ layer. Embeddings and heads in 8 bits are in `row_modules`, those in fewer in `coded`, whose
tensors are a `table`. `rows` makes those of 8, `embedding` swaps the modules, whose `vocabulary` cannot
change. `experts` takes fused experts apart and puts them together again, `stacks` any other parameter that holds many
weights. `replace` says which layers are quantized and swaps them. `frozen` and `counting` have the parameters of such
layers be what transformers expects.

Called by everything that has a model in its hands, whether it is quantized, loaded or tuned.
"""
