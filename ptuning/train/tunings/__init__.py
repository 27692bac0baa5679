"""What a run trains: a prefix, a LoRA adapter or the whole model, behind one protocol."""
