"""Whether a checkpoint belongs to the run that goes on from it: the same rows, batches, ranks."""

import logging
import zlib
from pathlib import Path

from ptuning.data.dataset import TokenDataset
from ptuning.train.flags import UsageError
from ptuning.train.resume.checkpointing import read_facts

logger = logging.getLogger("main")


def fingerprint_rows(rows: TokenDataset | None) -> str:
    """Return a short checksum of the training rows in their order; "" without any.

    The order in which rows are seen is drawn over their numbers, so other rows are another run.
    """
    if rows is None:
        return ""
    checksum = zlib.crc32(rows.arrays.offsets.tobytes())
    checksum = zlib.crc32(rows.arrays.context_lengths.tobytes(), checksum)
    checksum = zlib.crc32(rows.arrays.ids.tobytes(), checksum)
    return f"{len(rows)}-{checksum:08x}"


def check_same_run(checkpoint: Path, *, rows: str, rows_per_step: int, processes: int) -> None:
    """Refuse (UsageError) to go on with other rows; warn where the resume cannot be exact.

    Checkpoints of earlier versions do not say what they were trained on and are not checked.
    """
    facts = read_facts(checkpoint)
    if facts is None:
        return
    if facts["rows"] != rows:
        raise UsageError(
            f"{checkpoint} was trained on other rows ({facts['rows'] or 'none'}) than --train_file "
            f"has with these flags ({rows}); go on with the old file and lengths, or start a new "
            f"training from its weights: --init_from {checkpoint} with another --output_dir."
        )
    for what, then, now in (
        ("rows per step", facts["rows_per_step"], rows_per_step),
        ("processes", facts["processes"], processes),
    ):
        if then != now:
            logger.warning(
                "%s was written with %s %s and this run has %s: it goes on, but not exactly as "
                "one run would have",
                checkpoint,
                then,
                what,
                now,
            )
