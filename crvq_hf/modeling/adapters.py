"""PEFT: adapters train beside CRVQ layers as beside any `nn.Linear`, but must not be merged into them.

PEFT merges by adding to `weight`, which holds codes here. The shapes nearly always forbid that, with an error about
shapes; PEFT has no way for other packages to say so themselves, hence the function that it asks is wrapped.
"""

from __future__ import annotations

import functools
import sys

from .linear import CRVQLinear

PEFT_TUNERS = "peft.tuners.tuners_utils"


def refuse_merging() -> None:
    """Makes PEFT, which must have been imported, refuse to merge adapters into CRVQ layers; may be called again."""
    tuners = sys.modules[PEFT_TUNERS]
    check = getattr(getattr(tuners, "BaseTuner", None), "_check_merge_allowed", None)
    if check is None or hasattr(check, "refuses_crvq"):
        return

    @functools.wraps(check)
    def check_merge_allowed(tuner):
        layers = (layer for layer in tuner.model.modules() if isinstance(layer, tuners.BaseTunerLayer))
        if any(isinstance(layer.get_base_layer(), CRVQLinear) for layer in layers):
            raise ValueError(
                "Adapters cannot be merged into CRVQ layers, whose weights are codes; keep the adapter beside the "
                "model, or call model.dequantize() before merging."
            )
        check(tuner)

    check_merge_allowed.refuses_crvq = True
    tuners.BaseTuner._check_merge_allowed = check_merge_allowed
