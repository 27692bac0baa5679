"""The way of tuning that a command line asks for."""

from typing import Any

from ptuning.model.tuned import FULL, LORA
from ptuning.train.flags import Arguments
from ptuning.train.tunings.full import FullTuning
from ptuning.train.tunings.lora import LoraTuning
from ptuning.train.tunings.tuning import PrefixTuning, Tuning


def choose_tuning(arguments: Arguments, hub: dict[str, Any]) -> Tuning:
    """Return it, with nothing loaded yet; hub holds transformers' cache_dir, revision and token."""
    if arguments.training.tuning == LORA:
        return LoraTuning(arguments.model)
    if arguments.training.tuning == FULL:
        return FullTuning(arguments.model, trains=arguments.training.do_train, hub=hub)
    return PrefixTuning(arguments.model)
