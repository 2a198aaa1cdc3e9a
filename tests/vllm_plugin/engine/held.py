"""What a process holds of a model; in a module of its own, so that it can be sent to the processes by name."""


def held(model) -> tuple[int, int]:
    """Returns how many weights the CRVQ layers stand for, and the bytes of 8-bit embeddings and heads."""
    from crvq_hf.modeling.linear import CRVQLinear

    layers = [module for module in model.modules() if isinstance(module, CRVQLinear)]
    rows = {id(p): p.nbytes for p in model.parameters() if p.dtype.itemsize == 1 and p.dim() == 2}
    return sum(layer.in_features * layer.out_features for layer in layers), sum(rows.values())
