"""LoRA around a frozen int8 or int4 linear; imports the peft library."""

from typing import NoReturn

from peft.tuners.lora import Linear
from torch import nn


class QuantizedLoraLinear(Linear):
    """Adds B(A(x)), trained in float32, to what a frozen QuantizedLinear returns."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Return the widths, which peft would read from a float weight's shape."""
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: packed weights have no room for the product."""
        raise ValueError(
            "the base is quantised, and adding LoRA's product to packed int8 or int4 weights would "
            "round it away; keep the adapter next to the base, or load the base unquantised to "
            "merge."
        )
