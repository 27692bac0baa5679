"""What tuning attaches to a base, writes to disk and reads back: prefix, LoRA, whole model."""
