"""General prompts: the package's set, a base's own, a file of one's own."""

import json

import pytest

from ptuning.data.general_prompts import (
    FILE_NAME,
    GENERAL_PROMPTS,
    find_general_prompts,
    read_general_prompts,
)
from ptuning.data.raw_file import DataError
from ptuning.nano.corpus import general_text, sample_general_prompts
from ptuning.tunings.loading import NANO_DIR


def test_the_set_of_the_package_is_half_chinese_half_english():
    prompts = read_general_prompts(GENERAL_PROMPTS).prompts
    assert len(prompts) == len(set(prompts)) == 40
    assert all(
        any("\u4e00" <= character <= "\u9fff" for character in text) for text in prompts[:20]
    )
    assert all(text[0].isascii() and text[0].isalpha() for text in prompts[20:])


def test_a_named_file_comes_first_then_the_bases_own_then_the_packages(tmp_path):
    assert find_general_prompts("mine.jsonl", str(NANO_DIR)).name == "mine.jsonl"
    assert find_general_prompts(None, str(NANO_DIR)) == NANO_DIR / FILE_NAME
    assert find_general_prompts(None, str(tmp_path)) == GENERAL_PROMPTS
    assert find_general_prompts(None, "THUDM/chatglm-6b") == GENERAL_PROMPTS
    assert find_general_prompts(None, None) == GENERAL_PROMPTS


def test_nanos_own_set_is_what_its_code_draws():
    prompts = sample_general_prompts()
    assert (NANO_DIR / FILE_NAME).read_text(encoding="utf-8") == general_text(prompts)
    assert len(set(prompts)) == 40
    others = sample_general_prompts(200, seed=1, without=prompts)
    assert len(set(others)) == 200
    assert not set(others) & set(prompts)


def test_a_file_of_ones_own_may_have_further_columns(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "一", "output": 1}\n{"prompt": "two", "answer": 2}\n', encoding="utf-8"
    )
    assert read_general_prompts(path) == (path, ["一", "two"])


def test_a_file_without_prompts_is_told(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"question": "?"}]), encoding="utf-8")
    with pytest.raises(DataError, match='no column "prompt"'):
        read_general_prompts(path)
    path.write_text(json.dumps([{"prompt": ""}]), encoding="utf-8")
    with pytest.raises(DataError, match="no prompt"):
        read_general_prompts(path)
