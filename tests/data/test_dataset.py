"""Files to datasets: rows, the summary a user reads, and the cache between runs."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ptuning.data.collation import pad_right
from ptuning.data.dataset import (
    DataSummary,
    TokenDataset,
    load_generation_dataset,
    load_training_dataset,
)
from ptuning.data.prompts import RowFormat, TextRow, to_example
from ptuning.data.raw_row import DataError
from ptuning.data.tokenizer import ChatGLMTokenizer
from tests.data.one_row import labels_of, to_generation_prompt, to_training_example

ROWS = [
    {"content": "类型#裤*颜色#白色", "summary": "这件白色的裤子很轻。", "history": []},
    {"content": "你好", "summary": "你好，今天的天气很好！" * 5, "history": []},
    {"content": "", "summary": "没有问题", "history": []},
    {"content": "谢谢 <eop>", "summary": "好", "history": [["你好", "有什么可以帮你？"]]},
]
TEXT_ROWS = [
    TextRow(line, row["content"], row["summary"], tuple(map(tuple, row["history"])))
    for line, row in enumerate(ROWS, start=1)
]
COLUMNS = {"prompt_column": "content", "response_column": "summary", "history_column": "history"}
LENGTHS = {"max_source_length": 40, "max_target_length": 20}
OPTIONS = {"max_rows", "cache_dir", "overwrite_cache"}


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def load(
    path: Path, tokenizer: ChatGLMTokenizer, **changes: object
) -> tuple[TokenDataset, DataSummary]:
    options = {"cache_dir": path.parent / "cache", "show_progress": False}
    options |= {name: changes.pop(name) for name in OPTIONS & changes.keys()}
    row_format = RowFormat(**{**COLUMNS, **LENGTHS, **changes})
    return load_training_dataset(path, tokenizer, row_format, **options)


def test_rows_are_those_of_to_training_example(
    data_file: Path, tokenizer: ChatGLMTokenizer
) -> None:
    dataset, _ = load(data_file, tokenizer)
    kept = [TEXT_ROWS[0], TEXT_ROWS[1], TEXT_ROWS[3]]
    assert len(dataset) == len(kept)
    for item, row in zip(dataset, kept, strict=True):
        expected = to_training_example(tokenizer, to_example(row, RowFormat(**COLUMNS)), **LENGTHS)
        assert item["input_ids"].tolist() == expected.input_ids
        assert item["labels"].tolist() == labels_of(expected)
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].shape == item["labels"].shape == (len(expected.input_ids),)
    assert dataset.lengths.tolist() == [len(item["input_ids"]) for item in dataset]
    assert dataset[-1]["input_ids"].tolist() == dataset[2]["input_ids"].tolist()
    with pytest.raises(IndexError, match="row 3 is asked for; there are 3"):
        dataset[3]


def test_changing_an_item_leaves_the_dataset_alone(
    data_file: Path, tokenizer: ChatGLMTokenizer
) -> None:
    dataset, _ = load(data_file, tokenizer)
    before = dataset[0]["input_ids"].tolist()
    dataset[0]["input_ids"].zero_()
    assert dataset[0]["input_ids"].tolist() == before


def test_the_summary_counts_everything(data_file: Path, tokenizer: ChatGLMTokenizer) -> None:
    dataset, summary = load(data_file, tokenizer, max_source_length=30)
    assert (summary.num_read, summary.num_kept) == (4, 3)
    assert summary.answers_cut == 1
    assert summary.prompts_cut == 1  # the one with history
    assert summary.control_text_rows == 1
    assert summary.total_tokens == int(dataset.lengths.sum())
    assert summary.longest == int(dataset.lengths.max())
    assert summary.mean_length == pytest.approx(dataset.lengths.mean())
    labelled = sum(int((item["labels"] != -100).sum()) for item in dataset)
    assert summary.answer_tokens == labelled
    text = "\n".join(summary.lines())
    assert f"{data_file}: 4 rows read, 3 kept" in text
    assert '1 row (25.0%) dropped: empty "content" (line 3)' in text
    assert "format columns: history + content -> summary" in text
    assert "with the prompt cut: raise --max_source_length above 30" in text
    assert "with the answer cut: raise --max_target_length above 20" in text
    assert "such as <eop> written out" in text


def test_a_summary_without_losses_has_nothing_to_raise(
    data_file: Path, tokenizer: ChatGLMTokenizer
) -> None:
    _, summary = load(data_file, tokenizer, max_rows=1)
    assert len(summary.lines()) == 3
    assert "raise" not in "\n".join(summary.lines())


def test_the_second_run_takes_the_same_tokens_from_the_cache(
    data_file: Path, tokenizer: ChatGLMTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, first_summary = load(data_file, tokenizer)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("ptuning.data.dataset.to_training_batch", fail)
    second, summary = load(data_file, tokenizer)
    assert not first_summary.from_cache
    assert summary.from_cache
    assert "(tokens from the cache)" in summary.lines()[0]
    assert summary.lines()[1:] == first_summary.lines()[1:]
    for array, original in zip(second.arrays, first.arrays, strict=True):
        assert np.array_equal(array, original)
    # A renamed file is the same content, under its own name.
    moved = data_file.rename(data_file.with_name("train.json.bak")).rename(data_file)
    os.utime(moved, (0, 0))
    assert load(moved, tokenizer)[1].from_cache


@pytest.mark.parametrize(
    "changes",
    [
        {"max_source_length": 39},
        {"max_target_length": 19},
        {"recipe": "published"},
        {"history_column": None},
        {"source_prefix": "礼貌："},
        {"max_rows": 3},
        {"response_column": "content"},
    ],
)
def test_another_setting_is_another_cache(
    data_file: Path, tokenizer: ChatGLMTokenizer, changes: dict
) -> None:
    load(data_file, tokenizer)
    assert not load(data_file, tokenizer, **changes)[1].from_cache
    assert load(data_file, tokenizer, **changes)[1].from_cache
    assert load(data_file, tokenizer)[1].from_cache


def test_another_tokenizer_or_content_is_another_cache(
    data_file: Path, tokenizer: ChatGLMTokenizer, tokenizer_folder: Path
) -> None:
    load(data_file, tokenizer)
    older = ChatGLMTokenizer(tokenizer_folder / "ice_text.model", num_image_tokens=20)
    assert not load(data_file, older)[1].from_cache
    data_file.write_bytes(data_file.read_bytes().replace(b"history", b"History"))
    assert not load(data_file, tokenizer, history_column="History")[1].from_cache


def test_overwriting_the_cache_makes_it_again(data_file: Path, tokenizer: ChatGLMTokenizer) -> None:
    load(data_file, tokenizer)
    assert not load(data_file, tokenizer, overwrite_cache=True)[1].from_cache
    assert load(data_file, tokenizer)[1].from_cache


def test_a_broken_cache_is_announced_and_made_again(
    data_file: Path, tokenizer: ChatGLMTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = load(data_file, tokenizer)
    [cached] = (data_file.parent / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:-3])
    again, summary = load(data_file, tokenizer)
    assert "is broken" in caplog.text
    assert not summary.from_cache
    assert np.array_equal(again.arrays.ids, first.arrays.ids)
    assert load(data_file, tokenizer)[1].from_cache


def test_a_cache_with_other_notes_is_made_again(
    data_file: Path, tokenizer: ChatGLMTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    load(data_file, tokenizer)
    [cached] = (data_file.parent / "cache").iterdir()
    cached.write_bytes(cached.read_bytes().replace(b"num_read", b"num_reed"))
    assert not load(data_file, tokenizer)[1].from_cache
    assert "other notes" in caplog.text


def test_without_a_writable_cache_the_data_is_still_there(
    data_file: Path, tokenizer: ChatGLMTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, _ = load(data_file, tokenizer, cache_dir=data_file / "below a file")
    assert len(dataset) == 3
    assert "tokens cannot be kept" in caplog.text


def test_a_dataset_survives_pickling_for_worker_processes(
    data_file: Path, tokenizer: ChatGLMTokenizer
) -> None:
    load(data_file, tokenizer)
    mapped, summary = load(data_file, tokenizer)
    assert summary.from_cache
    twin = pickle.loads(pickle.dumps(mapped))
    assert twin[1]["input_ids"].tolist() == mapped[1]["input_ids"].tolist()
    loader = torch.utils.data.DataLoader(
        mapped, batch_size=3, collate_fn=lambda rows: pad_right(rows, pad_id=3)
    )
    [batch] = list(loader)
    assert batch["input_ids"].shape == (3, int(mapped.lengths.max()))


def test_faults_of_the_file_come_through(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(DataError, match=r"missing\.json: cannot be read"):
        load(tmp_path / "missing.json", tokenizer)
    empty = tmp_path / "empty.json"
    empty.write_text('{"content": "", "summary": "a", "history": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match='no row is left of 1: 1 x empty "content"'):
        load(empty, tokenizer)


# Prompts to answer


def test_generation_rows_keep_prompt_label_and_line(
    data_file: Path, tokenizer: ChatGLMTokenizer
) -> None:
    dataset, summary = load_generation_dataset(
        data_file, tokenizer, RowFormat(**COLUMNS, max_source_length=25), show_progress=False
    )
    assert [row.line for row in dataset] == [1, 2, 3, 4]
    assert [row.label for row in dataset] == [row["summary"] for row in ROWS]
    assert dataset[0].prompt == "类型#裤*颜色#白色"
    assert dataset[3].prompt.startswith("[Round 0]\n问：你好\n")
    assert dataset[2].input_ids == []  # no prompt: not answered, but a row all the same
    for index in (0, 1, 3):
        item = dataset[index]
        example = to_example(TEXT_ROWS[index], RowFormat(**COLUMNS), for_training=False)
        assert item.input_ids == to_generation_prompt(tokenizer, example, max_source_length=25)
    assert dataset.lengths.tolist() == [len(row.input_ids) for row in dataset]
    assert (summary.num_read, summary.num_kept, summary.prompts_cut) == (4, 3, 1)
    assert '  1 row (25.0%) not answered: no prompt in "content" (line 3)' in summary.lines()
    assert "prompts of" in summary.lines()[3]
    assert "answers" not in summary.lines()[3]


def test_the_published_recipe_evaluates_on_bare_queries(
    data_file: Path, tokenizer: ChatGLMTokenizer
) -> None:
    dataset, _ = load_generation_dataset(
        data_file,
        tokenizer,
        RowFormat(**COLUMNS, recipe="published"),
        show_progress=False,
    )
    assert dataset[0].prompt == ROWS[0]["content"]
    trained, _ = load(data_file, tokenizer, recipe="published")
    assert tokenizer.decode(trained[0]["input_ids"]).startswith("[Round 0]")


def test_prompts_can_come_without_answers(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"content": "一"}\n{"content": "二"}\n', encoding="utf-8")
    dataset, summary = load_generation_dataset(path, tokenizer, RowFormat(), show_progress=False)
    assert [(row.prompt, row.label) for row in dataset] == [("一", ""), ("二", "")]
    assert "no row has an answer to compare with, so nothing is scored" in summary.lines()[-1]
    path.write_text('{"content": "一", "summary": "1"}\n{"content": "二"}\n', encoding="utf-8")
    _, summary = load_generation_dataset(path, tokenizer, RowFormat(), show_progress=False)
    assert "1 row (50.0%) with an answer to compare with" in summary.lines()[-1]


def test_the_real_rows_have_the_published_lengths(
    shared: Path, real_tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    dataset, summary = load_training_dataset(
        shared / "data" / "AdvertiseGen" / "train_head5001.json",
        real_tokenizer,
        RowFormat(recipe="published"),
        cache_dir=tmp_path,
        show_progress=False,
    )
    assert len(dataset) == 5001
    assert summary.answers_cut / summary.num_kept == pytest.approx(0.54, abs=0.005)
    assert summary.longest == 128
