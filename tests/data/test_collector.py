"""The cyclic collector rests while rows are read, and afterwards is as it was."""

import gc
from pathlib import Path
from typing import Any

import pytest

from ptuning.data import dataset
from ptuning.data.dataset import collector_paused, load_generation_dataset, load_training_dataset
from ptuning.data.prompts import Example, RowFormat, to_example
from ptuning.data.raw_row import DataError
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.tunings.loading import NANO_DIR


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

    monkeypatch.setattr(dataset, "to_example", spied)
    tokenizer = ChatGLMTokenizer.from_pretrained(NANO_DIR)
    row_format = RowFormat(prompt_column="content", response_column="summary")
    cache = tmp_path / "cache"
    load_training_dataset(file, tokenizer, row_format, cache_dir=cache, show_progress=False)
    load_generation_dataset(file, tokenizer, row_format, show_progress=False)
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
