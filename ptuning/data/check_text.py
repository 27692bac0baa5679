"""What the text of a row may hold that a tokenizer, or a reader, takes for something else.

Here such words are encoded as plain text, but `<n>`, `<|tab|>` and `<|blank_k|>` come back as
whitespace, and other programs, the published code among them, read control tokens out of them.
"""

import re
import unicodedata

from ptuning.data.vocabulary import LEADING_PIECES, TRAILING_PIECES

REPLACEMENT = "\ufffd"  # stands where a character was lost
_NAMED = "|".join(
    re.escape(piece) for piece in sorted({*LEADING_PIECES, *TRAILING_PIECES}, key=len, reverse=True)
)
# The names of this vocabulary; image tokens of its older release and bytes; the form <|...|>, of
# this and later models.
_CONTROL_NAME = re.compile(
    rf"{_NAMED}|<image_\d+>|<0x[0-9A-F]{{2}}>|<\|[A-Za-z][\w .:-]{{0,38}}\|>", re.ASCII
)
_UNKNOWN_MARK = re.compile(r"<UNK>|\[UNK\]", re.IGNORECASE)
_FULL_WIDTH = re.compile("[＜［]")


def find_control_names(text: str) -> list[str]:
    """Return every control token written out in a text, in order; full-width forms count.

    >>> find_control_names("好<eop>的＜sop＞ x < y [0]")
    ['<eop>', '<sop>']
    """
    if _FULL_WIDTH.search(text):
        text = unicodedata.normalize("NFKC", text)  # as SentencePiece does after any search
    if "<" not in text and "[" not in text:
        return []
    return _CONTROL_NAME.findall(text)


def has_unknown_mark(text: str) -> bool:
    """Say whether a text writes out an unknown word's mark, as 30 % of ADGEN's answers do.

    >>> has_unknown_mark("这款<UNK>的裤子")
    True
    """
    return _UNKNOWN_MARK.search(text) is not None


def has_lost_characters(text: str) -> bool:
    """Say whether a text holds U+FFFD, which editors put where they could not read a character."""
    return REPLACEMENT in text
