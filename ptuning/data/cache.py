"""Token arrays on disk, so that an unchanged file is tokenised once.

One safetensors file per content: its name is a digest of everything the tokens depend on, so a
changed file, tokenizer or setting finds no cache instead of a wrong one. Arrays are memory-mapped.
A cache that cannot be read or written is announced and done without.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ptuning.storage import write_atomically

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3  # raise it when the preprocessing gives other tokens for the same settings


class TokenArrays(NamedTuple):
    """All rows end to end: row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # int32, one per token
    offsets: np.ndarray  # int64, one more than rows
    context_lengths: np.ndarray  # int32, the place of <sop> in each row


def default_cache_dir() -> Path:
    """Return `$PTUNING_CACHE`, or `~/.cache/ptuning/tokens` where that is not set."""
    named = os.environ.get("PTUNING_CACHE")
    return Path(named) if named else Path("~/.cache/ptuning/tokens").expanduser()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(cache_dir: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Return where tokens made under these settings lie; name is for people who look."""
    content = json.dumps({"format": FORMAT_VERSION, **settings}, sort_keys=True)
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    return cache_dir / f"{name}-{digest[:32]}.safetensors"


def load_tokens(path: Path) -> tuple[TokenArrays, dict[str, Any]] | None:
    """Return the memory-mapped arrays and the notes saved with them; None where there are none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # only "pt" maps the memory
            arrays = TokenArrays(*(file.get_tensor(name).numpy() for name in TokenArrays._fields))
            notes = json.loads(file.metadata()["notes"])
        _check_arrays(arrays)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("the token cache %s is broken (%s) and is made again", path, error)
        return None
    return arrays, notes


def save_tokens(path: Path, arrays: TokenArrays, notes: Mapping[str, Any]) -> bool:
    """Write the arrays whole or not at all; return whether it worked."""
    content = save(arrays._asdict(), metadata={"notes": json.dumps(dict(notes))})
    try:
        write_atomically(path, content)
    except OSError as error:
        logger.warning(
            "tokens cannot be kept in %s (%s), so the next run tokenises again; "
            "set PTUNING_CACHE to a folder that can be written",
            path.parent,
            error,
        )
        return False
    return True


def _check_arrays(arrays: TokenArrays) -> None:
    """Refuse arrays that do not fit together."""
    ids, offsets, context_lengths = arrays
    kinds = [array.dtype for array in arrays]
    if kinds != [np.int32, np.int64, np.int32] or any(array.ndim != 1 for array in arrays):
        raise ValueError(f"its arrays have the types {kinds}")
    lengths = np.diff(offsets)
    whole = len(offsets) == len(context_lengths) + 1 and len(offsets) > 1
    if not whole or offsets[0] != 0 or offsets[-1] != len(ids) or lengths.min() < 1:
        raise ValueError("its rows and tokens do not add up")
    if context_lengths.min() < 0 or (context_lengths >= lengths).any() or ids.min() < 0:
        raise ValueError("its rows have no room for their answers")
