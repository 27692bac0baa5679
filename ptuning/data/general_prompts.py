"""General prompts: what a base is asked before and after tuning, to measure what it has forgotten.

A file of them has a column `prompt`, in any format of data files; other columns are ignored. A base
can come with its own set, as the nano model does, which has no knowledge of the world.
"""

from pathlib import Path
from typing import NamedTuple

from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError
from ptuning.data.reading import read_rows

PROMPT_COLUMN = "prompt"
FILE_NAME = "general_prompts.json"
GENERAL_PROMPTS = Path(__file__).with_name(FILE_NAME)  # half Chinese, half English


class GeneralPrompts(NamedTuple):
    """The prompts, and the file that they are from."""

    source: Path
    prompts: list[str]


def find_general_prompts(named: str | None, base: str | None) -> Path:
    """Return the file named, else the one in the base's directory, else that of this package."""
    if named is not None:
        return Path(named)
    own = Path(base) / FILE_NAME if base is not None else GENERAL_PROMPTS
    return own if own.is_file() else GENERAL_PROMPTS


def read_general_prompts(path: Path) -> GeneralPrompts:
    """Return the prompts of a file in its order; DataError for one without any."""
    only = RowFormat(prompt_column=PROMPT_COLUMN, response_column=PROMPT_COLUMN)
    rows = read_rows(path, only, for_training=False)
    prompts = [row.prompt for row in rows.kept if row.prompt.strip()]
    if not prompts:
        raise DataError(path, None, f'no prompt; write rows such as {{"{PROMPT_COLUMN}": "..."}}.')
    return GeneralPrompts(path, prompts)
