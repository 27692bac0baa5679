"""The layout of a vocabulary, and the recipe that trains one."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from ptuning.data.vocabulary import (
    BLANK_PIECES,
    CONTROL_PIECES,
    NUM_FIXED_PIECES,
    control_indices,
    escape_whitespace,
    load_pieces,
    restore_whitespace,
)
from ptuning.nano.build import train_vocabulary

SENTENCES = ["一二三四五六七八九十，甲乙丙丁。", "the cat sat on the mat"] * 10


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("vocabulary") / "ice_text.model"
    train_vocabulary(SENTENCES, path, vocab_size=420)
    return load_pieces(str(path))


def fixed_layout(pieces: sentencepiece.SentencePieceProcessor) -> tuple[list[str], list[str]]:
    """Return the first five names, and all names from [MASK] on."""
    names = pieces.id_to_piece(list(range(len(pieces))))
    return names[:5], names[names.index("[MASK]") :]


def test_special_pieces_stand_where_the_published_ones_stand(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    leading, trailing = fixed_layout(pieces)
    assert leading == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    bytes_in_order = [f"<0x{value:02X}>" for value in range(256)]
    assert trailing == [*CONTROL_PIECES, "<|tab|>", *BLANK_PIECES, *bytes_in_order]


def test_the_layout_is_that_of_the_real_vocabulary(
    pieces: sentencepiece.SentencePieceProcessor, shared: Path
) -> None:
    real = load_pieces(str(shared / "data" / "chatglm-6b" / "ice_text.model"))
    assert fixed_layout(pieces) == fixed_layout(real)
    assert len(control_indices(pieces)) == len(control_indices(real)) == 11


def test_piece_types_are_kept_by_the_reordering(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    names = [pieces.id_to_piece(index) for index in control_indices(pieces)]
    assert names == ["<s>", "</s>", "<pad>", *CONTROL_PIECES]
    assert pieces.is_unknown(0)
    byte_indices = [index for index in range(len(pieces)) if pieces.is_byte(index)]
    assert len(byte_indices) == 256
    assert pieces.pad_id() == 3


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    sizes = [
        train_vocabulary(SENTENCES, tmp_path / name, vocab_size=420) for name in ("one", "two")
    ]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sizes[0] == sizes[1] == len(load_pieces(str(tmp_path / "one")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_vocab_size_counts_every_piece(tmp_path: Path) -> None:
    size = train_vocabulary(SENTENCES, tmp_path / "model", vocab_size=390)
    assert NUM_FIXED_PIECES < size <= 390


@pytest.mark.parametrize("vocab_size", [0, NUM_FIXED_PIECES])
def test_a_vocab_size_without_room_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"{NUM_FIXED_PIECES} pieces are fixed"):
        train_vocabulary(SENTENCES, tmp_path / "model", vocab_size=vocab_size)


def test_no_sentences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give more text"):
        train_vocabulary([], tmp_path / "model", vocab_size=400)
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_no_model_says_what_to_fetch(tmp_path: Path) -> None:
    pointer = tmp_path / "ice_text.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load_pieces(str(pointer))


def test_another_models_vocabulary_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "other"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="not the vocabulary of the first ChatGLM-6B"):
        load_pieces(str(tmp_path / "other.model"))


@given(st.text(alphabet=" \n\tab#", max_size=200))
def test_whitespace_survives_both_ways(text: str) -> None:
    escaped = escape_whitespace(text)
    assert restore_whitespace(escaped) == text
    assert not set("\n\t") & set(escaped)
    assert "  " not in escaped


@pytest.mark.parametrize(
    ("blanks", "escaped"),
    [
        (1, " "),
        (2, "<|blank_2|>"),
        (80, "<|blank_80|>"),
        (81, "<|blank_80|> "),
        (100, "<|blank_80|><|blank_20|>"),
    ],
)
def test_the_longest_run_of_blanks_is_taken_first(blanks: int, escaped: str) -> None:
    assert escape_whitespace(" " * blanks) == escaped


@pytest.mark.parametrize("text", ["<|blank_1|>", "<|blank_81|>", "<|blank_1000000000|>"])
def test_a_blank_piece_that_does_not_exist_stays_as_it_is(text: str) -> None:
    assert restore_whitespace(text) == text
