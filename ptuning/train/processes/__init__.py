"""Several processes doing what one does: launch, shares of rows, agreement."""
