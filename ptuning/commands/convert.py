"""`python -m ptuning convert SRC DST`: a checkpoint as safetensors, once and for all."""

import argparse
import logging
from pathlib import Path

from ptuning.model.checkpoint_convert import convert_checkpoint
from ptuning.model.checkpoint_hub import find_directory

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Convert and say what was written."""
    if not Path(arguments.source).exists() and arguments.source.count("/") != 1:
        raise ValueError(
            f"SRC is {arguments.source}, which does not exist; give the folder of a checkpoint, or "
            "a hub id such as THUDM/chatglm-6b."
        )
    directory = find_directory(arguments.source)
    summary = convert_checkpoint(
        directory, arguments.destination, quantization_bits=arguments.quantization_bit
    )
    logger.info("%s: %s", arguments.destination, summary)
    return 0
