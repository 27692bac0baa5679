"""`python -m ptuning export PREFIX DST --format ...`: a trained prefix for other programs."""

import argparse
import logging
from pathlib import Path

from ptuning.model.checkpoint import read_config
from ptuning.model.prefix_export import EXPORT_FORMATS, export_prefix

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("prefix", metavar="PREFIX", help="directory or file of a trained prefix")
    parser.add_argument("destination", metavar="DST", help="directory to write into")
    parser.add_argument(
        "--format",
        dest="form",
        required=True,
        choices=EXPORT_FORMATS,
        help="published: pytorch_model.bin; peft: an adapter; kv: keys and values per layer",
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="DIRECTORY",
        help="the base; needed only for a published prefix of another size than ChatGLM-6B's",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    base = arguments.model_name_or_path
    written = export_prefix(
        arguments.prefix,
        arguments.destination,
        form=arguments.form,
        base=None if base is None else read_config(Path(base)),
    )
    logger.info("wrote %s", written)
    return 0
