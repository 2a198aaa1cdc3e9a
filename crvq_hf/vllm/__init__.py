"""vLLM reads CRVQ checkpoints: a quantization method as vLLM takes them from installed packages.

`config` is what vLLM asks which method a layer gets, with the `names` that the checkpoint has codes for. `linear`,
`vocabulary` and `experts` are the methods; `stored` gathers the tensors of a layer as they are loaded, `slicing` cuts
them for tensor parallelism.

Called by vLLM, in each of its processes, through the entry point `vllm.general_plugins`; nothing else imports it.
"""


def register() -> None:
    """Makes vLLM know "crvq"; may be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import CRVQServing

    register_quantization_config("crvq")(CRVQServing)
