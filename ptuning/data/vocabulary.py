"""The pieces of a ChatGLM vocabulary.

A vocabulary file (`ice_text.model`) is a SentencePiece unigram model. Its first five ids are
`<unk>`, `<s>`, `</s>`, `<pad>`, `<n>`; then come the ordinary pieces, the control pieces, the
blanks and last the 256 bytes. Only `<n>`, the tab and the blanks can come out of text:
SentencePiece never matches a control piece in what it reads.
Source of the layout: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/ice_text.model
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

logger = logging.getLogger(__name__)

VOCABULARY_FILE = "ice_text.model"
UNKNOWN_PIECE = "<unk>"
PAD_PIECE = "<pad>"
END_PIECE = "</s>"
MASK_PIECE = "[MASK]"
GMASK_PIECE = "[gMASK]"
SOP_PIECE = "<sop>"
EOP_PIECE = "<eop>"
NEWLINE_PIECE = "<n>"
TAB_PIECE = "<|tab|>"
MAX_BLANKS = 80  # the longest run of blanks that has a piece of its own

CONTROL_PIECES = (
    MASK_PIECE,
    GMASK_PIECE,
    "[sMASK]",
    "<unused_0>",
    SOP_PIECE,
    EOP_PIECE,
    "<ENC>",
    "<dBLOCK>",
)
BLANK_PIECES = tuple(f"<|blank_{count}|>" for count in range(2, MAX_BLANKS + 1))
LEADING_PIECES = (UNKNOWN_PIECE, "<s>", END_PIECE, PAD_PIECE, NEWLINE_PIECE)
TRAILING_PIECES = (*CONTROL_PIECES, TAB_PIECE, *BLANK_PIECES)
WELL_KNOWN_PIECES = (
    UNKNOWN_PIECE,
    PAD_PIECE,
    END_PIECE,
    MASK_PIECE,
    GMASK_PIECE,
    SOP_PIECE,
    EOP_PIECE,
)
REQUIRED_PIECES = (*WELL_KNOWN_PIECES, NEWLINE_PIECE, TAB_PIECE, *BLANK_PIECES)
NUM_FIXED_PIECES = len(LEADING_PIECES) + len(TRAILING_PIECES) + 256  # 256: one piece for every byte

_WHITESPACE = re.compile(rf"\n|\t| {{2,{MAX_BLANKS}}}")
_WHITESPACE_PIECE = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def escape_whitespace(text: str) -> str:
    r"""Write newlines, tabs and runs of 2..80 blanks as their pieces, the longest run first.

    >>> escape_whitespace("a\n\tb    c")
    'a<n><|tab|>b<|blank_4|>c'
    """
    if text.isprintable() and "  " not in text:  # most text: a quick look saves the search
        return text
    return _WHITESPACE.sub(lambda match: _piece_of(match.group()), text)


def restore_whitespace(text: str) -> str:
    r"""Undo `escape_whitespace`.

    >>> restore_whitespace("a<n><|tab|>b<|blank_4|>c")
    'a\n\tb    c'
    """
    return _WHITESPACE_PIECE.sub(_whitespace_of, text)


def _piece_of(whitespace: str) -> str:
    if whitespace == "\n":
        return NEWLINE_PIECE
    return TAB_PIECE if whitespace == "\t" else f"<|blank_{len(whitespace)}|>"


def _whitespace_of(match: re.Match[str]) -> str:
    if match.group() == NEWLINE_PIECE:
        return "\n"
    if match.group() == TAB_PIECE:
        return "\t"
    count = int(match.group(1)) if len(match.group(1)) <= 2 else 0
    return " " * count if 2 <= count <= MAX_BLANKS else match.group()


def load_pieces(vocab_file: str) -> sentencepiece.SentencePieceProcessor:
    """Read the SentencePiece model and check that it is a ChatGLM-6B vocabulary."""
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
    except RuntimeError as error:
        raise ValueError(
            f"{vocab_file} is not a SentencePiece model (a git-lfs pointer or a cut download, "
            f"perhaps): {error}; fetch the {VOCABULARY_FILE} of THUDM/chatglm-6b again."
        ) from error
    missing = [name for name in REQUIRED_PIECES if not has_piece(pieces, name)]
    if missing:
        raise ValueError(
            f"{vocab_file} has no piece {', '.join(missing)}: it is not the vocabulary of the "
            f"first ChatGLM-6B; use the {VOCABULARY_FILE} of THUDM/chatglm-6b."
        )
    return pieces


def has_piece(pieces: sentencepiece.SentencePieceProcessor, name: str) -> bool:
    """Say whether the vocabulary has a piece of exactly this name."""
    return bool(pieces.id_to_piece(pieces.piece_to_id(name)) == name)


def is_byte_piece(name: str) -> bool:
    """Say whether a piece stands for one byte of a character that has no piece of its own.

    >>> is_byte_piece("<0xE4>"), is_byte_piece("<n>")
    (True, False)
    """
    return _BYTE_PIECE.fullmatch(name) is not None


def control_indices(pieces: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Return the places of all control pieces, those that text never yields."""
    return [index for index in range(len(pieces)) if pieces.is_control(index)]


def find_num_image_tokens(pieces: sentencepiece.SentencePieceProcessor, vocab_file: Path) -> int:
    """Return how far the config.json beside the vocabulary puts ids above pieces; else 0."""
    config_file = vocab_file.parent / "config.json"
    if not config_file.is_file():
        return 0
    with open(config_file, encoding="utf-8") as file:
        bos_token_id = json.load(file).get("bos_token_id")
    if not isinstance(bos_token_id, int):
        return 0
    return max(0, bos_token_id - int(pieces.piece_to_id(SOP_PIECE)))


def warn_about_added_tokens(
    pieces: sentencepiece.SentencePieceProcessor, added: Mapping[int, Any]
) -> None:
    """Say which tokens of a tokenizer saved elsewhere have no piece and are left out."""
    unknown = [str(token) for token in added.values() if not has_piece(pieces, str(token))]
    if unknown:
        logger.warning(
            "the added tokens %s are not in %s and are left out",
            ", ".join(unknown),
            VOCABULARY_FILE,
        )
