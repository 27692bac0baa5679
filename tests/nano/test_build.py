"""A build is repeatable, its rows follow the published layout, and its batches lose nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch

from ptuning.data.tokenizer import (
    BLANK_PIECES,
    CONTROL_PIECES,
    ChatGLMTokenizer,
    load_pieces,
)
from ptuning.nano.build import (
    NUM_FIXED_PIECES,
    NanoSettings,
    TokenizedRow,
    batches_of,
    build_weights,
    main,
    new_config,
    new_model,
    pad_right,
    rate_at,
    replace_folder,
    start_copying,
    tokenise,
    train_vocabulary,
)
from ptuning.nano.corpus import CorpusExample, sample_corpus
from ptuning.tunings.loading import NANO_DIR

TINY = replace(
    NanoSettings(),
    num_examples=96,
    num_vocabulary_examples=2_000,
    hidden_size=16,
    num_layers=2,
    batch_size=16,
    max_batch_tokens=100_000,  # no batch is split
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(NANO_DIR)


def test_two_builds_write_the_same_files(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    losses = []
    for folder in folders:
        folder.mkdir()
        losses.append(build_weights(folder, TINY))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6  # 96 examples / 16
    names = sorted(path.name for path in folders[0].iterdir())
    assert {"config.json", "model.safetensors", "ice_text.model", "tokenizer_config.json"} <= set(
        names
    )
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_weights_too_large_for_the_repository_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ptuning.nano.build.MAX_WEIGHTS_BYTES", 1_000)
    with pytest.raises(ValueError, match="hidden_size, num_layers or vocab_size"):
        build_weights(tmp_path, replace(TINY, num_examples=16))


def test_replace_folder_leaves_no_unfinished_file(tmp_path):
    new, folder = tmp_path / "new", tmp_path / "kept"
    new.mkdir()
    folder.mkdir()
    (new / "a").write_bytes(b"1")
    (folder / "a").write_bytes(b"0")
    replace_folder(new, folder)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a", b"1")]


def test_sample_only_writes_the_sample_and_no_weights(tmp_path):
    main(["--sample_only", "--sample", str(tmp_path / "s"), "--weights", str(tmp_path / "w")])
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["dev.json", "train.json"]
    assert not (tmp_path / "w").exists()


def test_rows_are_prompt_gmask_sop_answer_eop(tokenizer):
    (row,) = tokenise([CorpusExample("你好", "再见")], tokenizer)
    expected = tokenizer("你好", "再见")["input_ids"]
    assert row.ids == expected
    assert row.ids[row.answer_start] == tokenizer.sop_token_id
    (free,) = tokenise([CorpusExample("", "再见")], tokenizer)
    assert free.ids[1] == tokenizer.sop_token_id
    assert free.answer_start == 1


def test_labels_begin_at_sop_and_padding_is_hidden(tokenizer):
    rows = tokenise([CorpusExample("你好", "再见"), CorpusExample("", "再见")], tokenizer)
    batch = pad_right(rows, pad_id=3)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row.ids) for row in rows]
    start = rows[0].answer_start
    assert batch["labels"][0, :start].tolist() == [-100] * start
    assert batch["labels"][0, start:].tolist() == rows[0].ids[start:]
    assert batch["input_ids"][1, len(rows[1].ids) :].eq(3).all()


def test_every_row_is_in_exactly_one_batch(tokenizer):
    rows = tokenise(sample_corpus(100), tokenizer)
    batches = batches_of(rows, replace(TINY, batch_size=8))
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    assert max(len(batch) for batch in batches) == 8


def test_long_rows_share_a_batch_up_to_its_number_of_tokens():
    lengths = [10] * 9 + [30] * 4 + [500]
    rows = [TokenizedRow([index] * length, 1) for index, length in enumerate(lengths)]
    batches = batches_of(rows, replace(TINY, batch_size=8, max_batch_tokens=100))
    assert sorted([len(row.ids) for row in batch] for batch in batches) == [
        [10, 10, 10, 10, 10, 10, 10, 10],
        [10, 30, 30],
        [30, 30],
        [500],  # too long for any batch but its own
    ]


def test_config_takes_the_ids_from_the_vocabulary(tokenizer):
    config = new_config(TINY, tokenizer)
    assert config.bos_token_id == tokenizer.convert_tokens_to_ids("<sop>")
    assert config.gmask_token_id == tokenizer.convert_tokens_to_ids("[gMASK]")
    assert config.vocab_size == len(tokenizer)


def test_an_untrained_model_attends_to_what_followed_the_same_token(tokenizer):
    settings = NanoSettings()
    model = new_model(settings, new_config(settings, tokenizer)).eval()
    start_copying(model, settings)
    model.set_attn_implementation("eager")
    pieces = list(range(400, 430))
    rows = [*pieces, tokenizer.convert_tokens_to_ids("[gMASK]"), tokenizer.sop_token_id, *pieces]
    weights = model(torch.tensor([rows]), output_attentions=True).attentions
    previous = weights[0][0, 0].diagonal(-1)
    assert (previous > 0.9).float().mean() > 0.9
    answer = torch.arange(len(pieces) + 2, len(rows) - 1)  # each piece of the answer but the last
    followers = weights[settings.copying_layer][0, :2, answer, answer - len(pieces) - 1]  # (2, N)
    assert followers.mean(1).min() > 0.3  # 0.43 and 0.70; 1 / 60 for an even share


def test_rate_warms_up_and_falls():
    settings = replace(NanoSettings(), warmup_steps=10)
    rates = [rate_at(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] < rates[9]
    assert rates[99] == pytest.approx(settings.final_share, abs=0.01)
    assert torch.tensor(rates[10:]).diff().max() < 0


# The vocabulary

SENTENCES = ["一二三四五六七八九十，甲乙丙丁。", "the cat sat on the mat"] * 10


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("vocabulary") / "ice_text.model"
    train_vocabulary(SENTENCES, path, vocab_size=420)
    return load_pieces(str(path))


def control_pieces(pieces: sentencepiece.SentencePieceProcessor) -> list[str]:
    indices = range(len(pieces))
    return [pieces.id_to_piece(index) for index in indices if pieces.is_control(index)]


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
    assert control_pieces(pieces) == control_pieces(real)


def test_piece_types_are_kept_by_the_reordering(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    assert control_pieces(pieces) == ["<s>", "</s>", "<pad>", *CONTROL_PIECES]
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
