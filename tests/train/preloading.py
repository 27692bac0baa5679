"""What a process imports before it forks runs of main.py, which itself is light until it runs."""

import gc
import importlib

HEAVY = (
    "matplotlib.backends.backend_agg",  # drawn with at the end of a run
    "main",
    "transformers.models.auto.modeling_auto",
    "trainer_seq2seq",
    "ptuning.model.chatglm",
    "ptuning.model.quantization.layers",
    "ptuning.scoring.answering",
    "ptuning.train.rows",
    "ptuning.train.tuning",
)


def import_for_runs() -> None:
    """Import once for all runs, and leave it out of every run's garbage collections."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()
