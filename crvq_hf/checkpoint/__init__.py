"""What lies in files: names of models, safetensors headers, sizes in bits and bytes, damage.

`sources` and `gguf` open dense models. `headers` reads what tensors a checkpoint has, `info` and `breakdown` add up
what they take, `planned` what they will take, `loading` compares them with the model they are for. `metadata` is what
we write beside them, `verify` checks it.

Called by the quantizer while it loads and saves, by `sharing`, and by `commands`.
"""
