"""`python -m ptuning convert` and `export`: checkpoints and prefixes in other formats."""

import argparse
import logging
from pathlib import Path

from ptuning.model.checkpoint.convert import convert_checkpoint
from ptuning.model.checkpoint.files import find_directory
from ptuning.model.checkpoint.layout import read_config
from ptuning.tunings.loading import find_base
from ptuning.tunings.prefix import export_prefix

logger = logging.getLogger(__name__)


def convert(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as safetensors, quantised if asked."""
    directory = find_directory(find_base(arguments.source, flag="SRC"))
    summary = convert_checkpoint(
        directory, arguments.destination, quantization_bits=arguments.quantization_bit
    )
    logger.info("%s: %s", arguments.destination, summary)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a trained prefix in a format that other programs read."""
    base = arguments.model_name_or_path
    written = export_prefix(
        arguments.prefix,
        arguments.destination,
        form=arguments.form,
        base=base and read_config(Path(find_base(base, flag="--model_name_or_path"))),
    )
    logger.info("wrote %s", written)
    return 0
