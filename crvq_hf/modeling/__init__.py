"""What a quantized model is made of: modules, and how they come into a model.

`linear` is the CRVQ layer, `embedding` has embeddings and heads in 8 bits, `experts` takes fused experts apart and
puts them together again. `blocks` finds decoder blocks and watches their layers, `runner` runs them one by one on what
the model hands them, in `trees` of tensors, and `rehearsal` compares that with the model. `replace` says which layers
are quantized and swaps them. `frozen` and `counting` have the parameters of such layers be what transformers expects,
`dense_weight` and `adapters` have PEFT read a dense weight where codes are.

Called by everything that has a model in its hands, whether it is quantized, loaded or tuned.
"""
