"""Adapters beside quantized layers: `peft` has PEFT read a `dense_weight` where codes are, and refuse to change it.

Called by `crvq_hf` itself, once PEFT is imported.
"""
