"""What a training run needs around the trainer."""
