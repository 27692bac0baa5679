"""The pieces of a ChatGLM vocabulary, and how to train a small one of the same shape.

A vocabulary file (`ice_text.model`) is a SentencePiece unigram model. Its first five ids are
`<unk>`, `<s>`, `</s>`, `<pad>`, `<n>`; then come the ordinary pieces, the control pieces, the
blanks and last the 256 bytes. Only `<n>`, the tab and the blanks can come out of text:
SentencePiece never matches a control piece in what it reads.
Source of the layout: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/ice_text.model
"""

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from ptuning.atomic_file import write_atomically

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


def train_vocabulary(
    sentences: Iterable[str],
    path: Path | str,
    *,
    vocab_size: int,
    character_coverage: float = 0.9999,
    num_threads: int = 1,
) -> int:
    """Train a vocabulary file with the published special pieces in their order.

    Return its number of pieces. vocab_size counts every piece, the 349 fixed ones included; few
    sentences may yield fewer pieces. One thread gives the same file on every run. Raises
    ValueError where the sentences cannot fill a vocabulary at all.
    """
    path = Path(path)
    if vocab_size <= NUM_FIXED_PIECES:
        raise ValueError(
            f"vocab_size is {vocab_size}; {NUM_FIXED_PIECES} pieces are fixed, use more than that."
        )
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape_whitespace(sentence) for sentence in sentences),
            model_writer=trained,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            pad_id=3,
            control_symbols=list(CONTROL_PIECES),
            user_defined_symbols=[NEWLINE_PIECE, TAB_PIECE, *BLANK_PIECES],
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"no vocabulary of {vocab_size} pieces can be trained from these sentences: {error}; "
            "give more text, or another vocab_size."
        ) from error
    model = _reorder_pieces(trained.getvalue())
    write_atomically(path, model)
    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def _reorder_pieces(model: bytes) -> bytes:
    """Put the pieces of a trained model in the published order; ids are places in the file.

    The trainer can only write control and user-defined pieces first. A model is a protocol buffer
    whose field 1 is one piece, repeated:
    https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto
    """
    records: dict[str, bytes] = {}
    others = []
    for field, record in _split_fields(model):
        if field == 1:
            records[_piece_name(record)] = record
        else:
            others.append(record)
    fixed = {*LEADING_PIECES, *TRAILING_PIECES}
    byte_names = [name for name in records if is_byte_piece(name)]
    ordinary = [name for name in records if name not in fixed and name not in set(byte_names)]
    order = [*LEADING_PIECES, *ordinary, *TRAILING_PIECES, *byte_names]
    return b"".join([*(records[name] for name in order), *others])


def _split_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (field number, whole record with its tag); a model holds only nested messages."""
    start = 0
    while start < len(message):
        tag, body = _read_varint(message, start)
        assert tag & 7 == 2, f"field {tag >> 3} of a SentencePiece model is not a nested message"
        length, body = _read_varint(message, body)
        yield tag >> 3, message[start : body + length]
        start = body + length


def _piece_name(record: bytes) -> str:
    """Read the text of one piece record: its own field 1."""
    _, body = _read_varint(record, 0)
    _, body = _read_varint(record, body)
    tag, body = _read_varint(record, body)
    assert tag == 0x0A, "a SentencePiece piece does not begin with its text"
    length, body = _read_varint(record, body)
    return record[body : body + length].decode("utf-8")


def _read_varint(message: bytes, index: int) -> tuple[int, int]:
    """Return the number at index and the index after it: seven bits a byte, lowest first."""
    value = shift = 0
    while True:
        byte = message[index]
        value |= (byte & 0x7F) << shift
        index += 1
        shift += 7
        if byte < 0x80:
            return value, index
