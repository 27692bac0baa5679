"""Exact labels: what a row is trained on decodes to its answer and <eop>, and nothing else.

Answers are compared as ids and, what is visible of them, as text: the tokenizer normalises (NFKC).
"""

import json
import unicodedata
from pathlib import Path

import pytest

from ptuning.data.dataset import DataSummary, TokenDataset, load_training_dataset
from ptuning.data.prompts import RowFormat, TextRow, to_example
from ptuning.data.reading import read_rows
from ptuning.data.tokenization import IGNORED_LABEL
from ptuning.data.tokenizer import ChatGLMTokenizer

# file, labelled rows
PUBLIC = [
    ("alpaca/alpaca_5000.json", 4998),
    ("alpaca/cherry_alpaca_5_percent.json.gz", 3111),
    ("lima/lima.json", 1029),
    ("lima/llamafactory_alpaca_en_demo.json", 999),
    ("lima/llamafactory_alpaca_zh_demo.json", 1000),
    ("lima/llamafactory_glaive_toolcall_en_demo.json.gz", 957),
    ("lima/llamafactory_glaive_toolcall_zh_demo.json.gz", 940),
    ("lima/llamafactory_v1_sft_demo.jsonl.gz", 500),
    ("lima/oaast_sft_zh.json.gz", 689),
    ("lima/example_history.json", 2),
    ("lima/self_cognition_zh.json", 80),
    ("lima/llamafactory_identity.json", 91),
    ("AdvertiseGen/dev.json", 1070),
]
# a row in each format, with the answers it is trained on
ROWS = [
    ({"content": "类型#裙", "summary": "好看的裙子。"}, ["好看的裙子。"]),
    ({"prompt": "甲", "response": "ＡＢＣ①", "history": [["乙", "丙"]]}, ["ＡＢＣ①"]),
    ({"instruction": "译", "input": "苹果", "output": "apple <eop> pie"}, ["apple <eop> pie"]),
    ({"instruction": "译", "output": " 两\t端\n有空白 \n"}, [" 两\t端\n有空白 \n"]),
    (
        {
            "conversations": [
                {"from": "system", "value": "你是助手。"},
                {"from": "human", "value": "问"},
                {"from": "gpt", "value": "答一"},
                {"from": "human", "value": "又问"},
                {"from": "gpt", "value": "答二"},
            ]
        },
        ["答一", "答二"],
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "😀 hello"},
            ]
        },
        ["😀 hello"],
    ),
    ({"history": [["一", "二"], ["三", "四"]]}, ["二", "四"]),
    ({"conversations": ["一问", "一答", "二问", "二答"]}, ["一答", "二答"]),
]


def load(
    path: Path, tokenizer: ChatGLMTokenizer, cache_dir: Path, row_format: RowFormat
) -> tuple[TokenDataset, DataSummary]:
    return load_training_dataset(path, tokenizer, row_format, cache_dir=cache_dir)


def visible(text: str) -> str:
    """Return what the tokenizer keeps of every text: NFKC, without white space and control codes."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())


def check_labels(
    dataset: TokenDataset, rows: list[TextRow], tokenizer: ChatGLMTokenizer, row_format: RowFormat
) -> tuple[int, int]:
    """Check every row against the tokens of its texts; return the prompts and answers cut."""
    assert len(dataset) == len(rows)
    prompts = tokenizer.encode_batch([to_example(row, row_format).prompt for row in rows])
    answers = tokenizer.encode_batch([row.response for row in rows])
    source, target = row_format.max_source_length, row_format.max_target_length
    prompts_cut = answers_cut = 0
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for item, row, prompt, answer in zip(dataset, rows, prompts, answers, strict=True):
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        trained = [label for label in labels if label != IGNORED_LABEL]
        context = ids[: len(ids) - len(trained)]
        assert labels == [IGNORED_LABEL] * len(context) + trained
        assert ids == context + trained
        assert trained[0] == start
        assert len(trained) > 2  # more than <sop> <eop>
        if len(answer) <= target - 2:
            assert trained[1:] == [*answer, end]
            assert visible(tokenizer.decode(trained[1:-1])) == visible(row.response)
        else:  # no <eop>: the answer does not end there
            assert trained[1:] == answer[: target - 2]
            answers_cut += 1
        assert context[-1] == tokenizer.gmask_token_id
        if len(prompt) <= source - 1:
            assert context[:-1] == prompt
        else:
            assert len(context) <= source
            prompts_cut += 1
    return prompts_cut, answers_cut


@pytest.mark.parametrize("lengths", [(64, 64), (8192, 16384)], ids=["published", "whole"])
@pytest.mark.parametrize(("name", "num_rows"), PUBLIC, ids=[row[0] for row in PUBLIC])
def test_labels_of_public_files_are_their_answers(
    name: str, num_rows: int, lengths, shared: Path, real_tokenizer, tmp_path: Path
) -> None:
    path = shared / "data" / name
    row_format = RowFormat(max_source_length=lengths[0], max_target_length=lengths[1])
    rows = read_rows(path, row_format).kept
    assert len(rows) == num_rows
    dataset, summary = load(path, real_tokenizer, tmp_path, row_format)
    cut = check_labels(dataset, rows, real_tokenizer, row_format)
    assert cut == (summary.prompts_cut, summary.answers_cut)
    if lengths[1] > 64:
        assert summary.answers_cut == 0


@pytest.mark.parametrize(("row", "answers"), ROWS, ids=[" ".join(row) for row, _ in ROWS])
def test_labels_of_every_format_are_its_answers(
    row, answers, real_tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    row_format = RowFormat()
    dataset, summary = load(path, real_tokenizer, tmp_path, row_format)
    rows = read_rows(path, row_format).kept
    assert [one.response for one in rows] == answers
    assert check_labels(dataset, rows, real_tokenizer, row_format) == (0, 0)
    assert summary.num_labelled == len(answers)


def test_the_labels_of_the_nano_tokenizer_are_the_answers(tokenizer, tmp_path: Path) -> None:
    """As above, where the real vocabulary is not at hand: every answer, whole and cut."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "你好", "response": answer, "history": [["问", "答"]] * n}
        for n, answer in enumerate(
            ["好看", "a < b ①", " 😀\n\t", "这件白色的衬衫很轻" * 9, "<eop>"]
        )
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    row_format = RowFormat(max_source_length=64, max_target_length=32)
    dataset, summary = load(path, tokenizer, tmp_path, row_format)
    kept = read_rows(path, row_format).kept
    cut = check_labels(dataset, kept, tokenizer, row_format)
    assert cut == (summary.prompts_cut, summary.answers_cut)
    assert summary.answers_cut == 1
