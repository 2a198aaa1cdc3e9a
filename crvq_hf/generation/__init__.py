"""Writing tokens: a decode loop whose whole step runs out of one CUDA graph, in the place of transformers' own.

`loop` has `decode`, for `model.generate(..., custom_generate=decode)`, and what it does a token at a time; `sampling`
chooses the next token, `cache` holds keys and values at fixed addresses, `graph` captures the step. `fitness` says
what is left to transformers, `default` where the loop is used without being asked for.

Called by `commands`, and by whoever hands `crvq_hf.decode` to `generate`; knows nothing of quantized layers.
"""
