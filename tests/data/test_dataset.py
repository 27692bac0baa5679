"""Files to datasets: rows, the summary a user reads, and the cache between runs."""

import gc
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptuning.data import dataset as dataset_module
from ptuning.data.dataset import (
    DataSummary,
    TokenArrays,
    TokenDataset,
    cache_path,
    collector_paused,
    default_cache_dir,
    load_generation_dataset,
    load_tokens,
    load_training_dataset,
    mix_rows,
    save_tokens,
)
from ptuning.data.prompts import Example, RowFormat, TextRow, to_example
from ptuning.data.raw_file import DataError
from ptuning.data.tokenization import pad_right
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.tunings.loading import NANO_DIR
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
    options = {"cache_dir": path.parent / "cache"}
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
    assert f"rows of {dataset.lengths.mean():.1f} tokens on average" in summary.lines()[-4]
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
    assert "is corrupt" in caplog.text
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
        data_file, tokenizer, RowFormat(**COLUMNS, max_source_length=25)
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
    )
    assert dataset[0].prompt == ROWS[0]["content"]
    trained, _ = load(data_file, tokenizer, recipe="published")
    assert tokenizer.decode(trained[0]["input_ids"]).startswith("[Round 0]")


def test_prompts_can_come_without_answers(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"content": "一"}\n{"content": "二"}\n', encoding="utf-8")
    dataset, summary = load_generation_dataset(path, tokenizer, RowFormat())
    assert [(row.prompt, row.label) for row in dataset] == [("一", ""), ("二", "")]
    assert "no row has an answer to compare with, so nothing is scored" in summary.lines()[-1]
    path.write_text('{"content": "一", "summary": "1"}\n{"content": "二"}\n', encoding="utf-8")
    _, summary = load_generation_dataset(path, tokenizer, RowFormat())
    assert "1 row (50.0%) with an answer to compare with" in summary.lines()[-1]


def test_the_real_rows_have_the_published_lengths(
    shared: Path, real_tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    dataset, summary = load_training_dataset(
        shared / "data" / "AdvertiseGen" / "train_head5001.json",
        real_tokenizer,
        RowFormat(recipe="published"),
        cache_dir=tmp_path,
    )
    assert len(dataset) == 5001
    assert summary.answers_cut / summary.num_kept == pytest.approx(0.54, abs=0.005)
    assert summary.longest == 128


# The token cache

ARRAYS = TokenArrays(
    ids=np.array([5, 6, 7, 8, 9], dtype=np.int32),
    offsets=np.array([0, 3, 5], dtype=np.int64),
    context_lengths=np.array([1, 1], dtype=np.int32),
)
SUMMARY = DataSummary(
    source="old/a.json",
    heading="3 rows read, 2 kept",
    found=['1 row dropped: empty "答"'],
    num_read=3,
    num_kept=2,
    max_source_length=64,
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.safetensors"
    save_tokens(path, ARRAYS, SUMMARY)
    loaded = load_tokens(path, "a.json")
    assert loaded is not None
    dataset, summary = loaded
    for array, original in zip(dataset.arrays, ARRAYS, strict=True):
        assert array.dtype == original.dtype
        assert array.tolist() == original.tolist()
    assert summary == replace(SUMMARY, source="a.json", from_cache=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing unfinished


def test_loaded_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS, SUMMARY)
    loaded = load_tokens(path, "a.json")
    assert loaded is not None
    assert str(path) in maps.read_text(encoding="utf-8")


def test_saving_again_replaces_a_file_that_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS, SUMMARY)
    loaded = load_tokens(path, "a.json")
    longer = ARRAYS._replace(ids=np.array([1, 2, 3, 4, 5], dtype=np.int32))
    save_tokens(path, longer, SUMMARY)
    assert loaded is not None
    assert loaded[0].arrays.ids.tolist() == ARRAYS.ids.tolist()  # the open one keeps its content


def test_no_file_is_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_tokens(tmp_path / "none.safetensors", "a.json") is None
    assert caplog.text == ""


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_cut_file_is_announced_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int
) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS, SUMMARY)
    path.write_bytes(path.read_bytes()[:keep])
    assert load_tokens(path, "a.json") is None
    assert f"the token cache {path} is corrupt" in caplog.text


def test_a_folder_that_cannot_be_written_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    save_tokens(tmp_path / "file" / "tokens.safetensors", ARRAYS, SUMMARY)
    assert "the next run tokenizes again" in caplog.text
    assert "PTUNING_CACHE" in caplog.text


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_out(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptuning.storage.os.fsync", run_out)
    save_tokens(tmp_path / "tokens.safetensors", ARRAYS, SUMMARY)
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


def test_every_setting_has_its_own_file(tmp_path: Path) -> None:
    settings = {"file": "a", "recipe": "corrected", "max_rows": None}
    paths = {
        cache_path(tmp_path, "train", settings),
        cache_path(tmp_path, "train", dict(reversed(settings.items()))),
    }
    assert len(paths) == 1
    for key in settings:
        paths.add(cache_path(tmp_path, "train", {**settings, key: "other"}))
    assert len(paths) == 4


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("PTUNING_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ptuning" / "tokens"


# The garbage collector


def test_it_rests_inside_and_works_again_after() -> None:
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "an inner block must not wake what an outer one stilled"
    assert gc.isenabled()


def test_it_works_again_after_an_error() -> None:
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_rests_while_both_kinds_of_rows_are_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"content": "类型#裤", "summary": "宽松的裤子"}\n', encoding="utf-8")
    seen: list[bool] = []

    def spied(*arguments: Any, **options: Any) -> Example:
        seen.append(gc.isenabled())
        return to_example(*arguments, **options)

    monkeypatch.setattr(dataset_module, "to_example", spied)
    tokenizer = ChatGLMTokenizer.from_pretrained(NANO_DIR)
    row_format = RowFormat(prompt_column="content", response_column="summary")
    cache = tmp_path / "cache"
    load_training_dataset(file, tokenizer, row_format, cache_dir=cache)
    load_generation_dataset(file, tokenizer, row_format)
    assert seen == [False, False]
    assert gc.isenabled()


def test_a_file_that_is_refused_leaves_it_on(tmp_path: Path) -> None:
    tokenizer = ChatGLMTokenizer.from_pretrained(NANO_DIR)
    with pytest.raises(DataError):
        load_generation_dataset(
            tmp_path / "none.json",
            tokenizer,
            RowFormat(prompt_column="content", response_column=None),
        )
    assert gc.isenabled()


# Mixing


def dataset(count: int, first_id: int) -> TokenDataset:
    """Rows of 3, 4, 5, ... tokens; every token of row i is first_id + i."""
    lengths = np.arange(count) + 3
    ids = np.repeat(first_id + np.arange(count), lengths).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return TokenDataset(TokenArrays(ids, offsets, np.ones(count, dtype=np.int32)))


def names(rows: TokenDataset) -> list[int]:
    return [int(rows[index]["input_ids"][0]) for index in range(len(rows))]


@pytest.mark.parametrize(("share", "general"), [(0.2, 2), (0.5, 8), (0.75, 24), (0.01, 1)])
def test_the_ratio_is_the_share_of_all_rows(share, general):
    mixed = mix_rows(dataset(8, 100), dataset(5, 200), share=share, seed=1)
    assert len(mixed) == 8 + general
    assert names(mixed)[:8] == list(range(100, 108))
    taken = np.bincount(np.array(names(mixed)[8:]) - 200, minlength=5)
    assert taken.max() - taken.min() <= 1  # none again before all were taken


def test_rows_keep_their_tokens_labels_and_lengths():
    task, general = dataset(4, 100), dataset(3, 200)
    mixed = mix_rows(task, general, share=0.6, seed=3)
    assert len(mixed) == 10
    for index in range(len(mixed)):
        name = names(mixed)[index]
        source = task[name - 100] if name < 200 else general[name - 200]
        assert mixed[index]["input_ids"].equal(source["input_ids"])
        assert mixed[index]["labels"].equal(source["labels"])
    assert mixed.arrays.ids.dtype == np.int32
    assert mixed.lengths.sum() == len(mixed.arrays.ids)


def test_the_seed_decides_which_rows():
    task, general = dataset(8, 100), dataset(50, 200)
    draws = [names(mix_rows(task, general, share=0.5, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
