"""`python -m ptuning answer`: a base's own answers as rows for --mix."""

import json
import logging

import torch

from ptuning import __main__ as program
from ptuning.commands.answer import answer
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows
from ptuning.engine.engine import Decoding
from ptuning.tunings.loading import NANO_DIR, load_base, load_tokenizer


def test_nanos_answers_become_rows_and_cut_ones_are_left_out(tmp_path, caplog):
    prompts = ["你好", "你好", "谢谢", "hello"]  # answers of 18, 11 and 21 tokens
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "asked.jsonl").write_text(lines, encoding="utf-8")
    out = tmp_path / "general.jsonl"
    caplog.set_level(logging.INFO)
    command = ["answer", str(tmp_path / "asked.jsonl"), "--output", str(out)]
    assert program.main([*command, "--max_new_tokens", "20"]) == 0
    rows = read_rows(out, RowFormat()).kept
    assert [row.prompt for row in rows] == ["你好", "谢谢"]
    assert rows[0].response.startswith("你好")
    assert "dropped 1 answers" in caplog.text


def test_answers_do_not_depend_on_the_batch():
    model = load_base(str(NANO_DIR), dtype=torch.float32)
    tokenizer = load_tokenizer(str(NANO_DIR))
    prompts = ["你好", "who are you", "写成英文：类型#裙*颜色#白色", "谢谢", "再见"]
    one, many = (
        answer(model, tokenizer, prompts, Decoding(max_new_tokens=32), batch_size=size)
        for size in (1, 5)
    )
    assert one == many
    assert None not in one
