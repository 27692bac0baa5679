"""`python -m ptuning export PREFIX DST --format ...`: a trained prefix for other programs."""

import argparse
import logging
from pathlib import Path

from ptuning.model.checkpoint.layout import read_config
from ptuning.tunings.loading import find_base
from ptuning.tunings.prefix import export_prefix

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    base = arguments.model_name_or_path
    written = export_prefix(
        arguments.prefix,
        arguments.destination,
        form=arguments.form,
        base=base and read_config(Path(find_base(base, flag="--model_name_or_path"))),
    )
    logger.info("wrote %s", written)
    return 0
