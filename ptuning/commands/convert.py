"""`python -m ptuning convert SRC DST`: a checkpoint as safetensors, once and for all."""

import argparse
import logging

from ptuning.model.checkpoint.convert import convert_checkpoint
from ptuning.model.checkpoint.hub import find_directory
from ptuning.tunings.loading import find_base

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Convert and say what was written."""
    directory = find_directory(find_base(arguments.source, flag="SRC"))
    summary = convert_checkpoint(
        directory, arguments.destination, quantization_bits=arguments.quantization_bit
    )
    logger.info("%s: %s", arguments.destination, summary)
    return 0
