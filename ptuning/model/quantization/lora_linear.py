"""LoRA beside a frozen int8 or int4 linear; imported only where the peft library is."""

from typing import NoReturn

from peft.tuners.lora import Linear
from torch import nn

MERGING = (
    "the base is quantised, and adding LoRA's product to packed int8 or int4 weights would round "
    "it away; keep the adapter beside the base, or load the base unquantised to merge."
)


class QuantizedLoraLinear(Linear):
    """Adds B(A(x)) to what a QuantizedLinear returns; that layer passes the input's gradient on.

    The adapter is trained in float32 and the packed weight stays as it is, so merging is refused.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Return the widths, which peft would look for in a float weight's shape."""
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: packed weights have no room for the product."""
        raise ValueError(MERGING)
