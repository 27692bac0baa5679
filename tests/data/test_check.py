"""The data check: what it counts in a file, and that no file stops it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ptuning.data.check import CHUNK_ROWS, Encoder, FileCounts, check_file
from ptuning.data.check_findings import (
    ANSWER_RESERVE,
    NOTICES,
    PROBLEMS,
    PROMPT_RESERVE,
    Finding,
    cut_share,
    find_between,
    find_in_file,
    sufficient_limit,
)
from ptuning.data.check_report import (
    FileReport,
    PairReport,
    as_values,
    file_as_text,
    pair_as_text,
)
from ptuning.data.formatting import RowFormat, to_example
from ptuning.data.reading import DataError, read_rows
from ptuning.data.tokenization import to_training_batch
from ptuning.data.tokenizer import ChatGLMTokenizer

ROWS = [{"content": "类型#裙", "summary": "简约"}, {"content": "颜色#蓝色", "summary": "条纹"}]
FORMAT = RowFormat(prompt_column="content", response_column="summary")


@pytest.fixture(scope="session")
def encoder(tokenizer: ChatGLMTokenizer) -> Encoder:
    return Encoder.of(tokenizer)


def as_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check(
    path: Path, content: str | bytes | list[Any], encoder: Encoder, row_format: RowFormat = FORMAT
) -> FileCounts:
    text = as_lines(content) if isinstance(content, list) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return check_file(path, encoder, row_format, show_progress=False)


def find(counts: FileCounts) -> dict[str, Finding]:
    return {finding.kind: finding for finding in find_in_file(counts)}


def row(content: Any = "甲", summary: Any = "乙") -> dict[str, Any]:
    return {"content": content, "summary": summary}


def test_a_clean_file_has_no_finding(tmp_path: Path, encoder: Encoder) -> None:
    counts = check(tmp_path / "a.json", ROWS, encoder)
    assert (counts.num_read, counts.num_used, counts.encoding) == (2, 2, "UTF-8")
    assert find(counts) == {}


# One fault each


@pytest.mark.parametrize(
    ("rows", "kind", "count", "places"),
    [
        ([*ROWS, row(""), row(None), row(" \n")], "empty_field", 3, (3, 4, 5)),
        ([*ROWS, {"content": "甲"}], "empty_field", 1, (3,)),
        ([row(), *ROWS, row(), row()], "duplicate_row", 2, (4, 5)),
        ([*ROWS, row(["a"]), [1]], "broken_row", 2, (3, 4)),
        ([*ROWS, row("甲<eop>", "[gMASK]乙")], "control_text", 1, (3,)),
        ([*ROWS, row("＜sop＞")], "control_text", 1, (3,)),
        ([*ROWS, row("甲", "a<n>b")], "control_text", 1, (3,)),
        ([*ROWS, row("甲", "<|im_start|>")], "control_text", 1, (3,)),
        ([*ROWS, row("<image_12>")], "control_text", 1, (3,)),
        ([*ROWS, row("甲", "这款<UNK>的")], "unknown_mark", 1, (3,)),
        ([*ROWS, row("<UNK>")], "unknown_mark_prompt", 1, (3,)),
        ([*ROWS, row("甲", "好\ufffd")], "lost_character", 1, (3,)),
        ([*ROWS, row("甲", "\u200b")], "no_tokens", 1, (3,)),
        ([row(), *ROWS, row("甲", "丙"), row("甲", "丁")], "several_answers", 1, (1,)),
        ([*ROWS, row("颜色", "龘")], "spelled_character", 1, (3,)),
        ([*ROWS, row("甲", "乙" * 63)], "cut_answer", 1, ()),
        ([*ROWS, row("甲" * 64)], "cut_prompt", 1, ()),
    ],
)
def test_each_fault_is_counted_where_it_is(
    tmp_path: Path,
    encoder: Encoder,
    rows: list[Any],
    kind: str,
    count: int,
    places: tuple[int, ...],
) -> None:
    found = find(check(tmp_path / "a.json", rows, encoder))
    assert found[kind].count == count
    assert found[kind].places == places
    assert found[kind].is_problem == (kind in PROBLEMS)
    assert found[kind].remedy


def test_ordinary_brackets_are_no_control_tokens(tmp_path: Path, encoder: Encoder) -> None:
    rows = [row("[Round 0] x < y > z [1]", "<b>好</b> | <| |> [mask] <sos>")]
    assert "control_text" not in find(check(tmp_path / "a.json", rows, encoder))


def test_control_tokens_are_listed_in_the_order_of_the_text(
    tmp_path: Path, encoder: Encoder
) -> None:
    names = ["<sop>", "<n>", "[gMASK]", "<eop>", "<|tab|>"]
    found = find(check(tmp_path / "a.json", [row("".join(names))], encoder))
    assert found["control_text"].examples == tuple(f"{name} in 1 row" for name in names)


def test_only_the_first_places_are_kept_and_all_are_counted(
    tmp_path: Path, encoder: Encoder
) -> None:
    found = find(check(tmp_path / "a.json", [row()] * 100, encoder))
    assert found["duplicate_row"].count == 99
    assert found["duplicate_row"].places == (2, 3, 4, 5, 6)
    assert found["duplicate_row"].examples[0] == "line 2 = line 1"


def test_characters_without_a_token_are_named(tmp_path: Path, encoder: Encoder) -> None:
    counts = check(tmp_path / "a.json", [*ROWS, row("龘龘", "这件")], encoder)
    assert counts.spelled_characters["龘"] == 2
    assert "这" not in counts.spelled_characters


class WithoutBytes:
    """A vocabulary without bytes: the ids of one that has them, each byte made the unknown id."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = self.encoder.tokenizer.encode_batch(texts)
        return [
            [self.encoder.unknown_id if self.encoder.is_byte[i] else i for i in ids]
            for ids in encoded
        ]


def test_characters_that_become_the_unknown_token_are_a_problem(
    tmp_path: Path, encoder: Encoder
) -> None:
    vocabulary: Any = WithoutBytes(encoder)
    without = Encoder(vocabulary, np.zeros_like(encoder.is_byte), encoder.unknown_id)
    found = find(check(tmp_path / "a.json", [row("这件", "衬衫"), row("这件", "龘")], without))
    assert found["unknown_token"].places == (2,)
    assert found["unknown_token"].is_problem


# Encodings


@pytest.mark.parametrize(
    ("codec", "name", "has_mark"),
    [
        ("utf-8", "UTF-8", False),
        ("utf-8-sig", "UTF-8", True),
        ("gbk", "GBK", False),
        ("gb18030", "GBK", False),
        ("utf-16", "UTF-16", True),
        ("utf-16-le", "UTF-16", False),
        ("utf-16-be", "UTF-16", False),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_every_encoding_is_named_and_checked(
    tmp_path: Path, encoder: Encoder, codec: str, name: str, has_mark: bool, suffix: str
) -> None:
    rows = [*ROWS, *ROWS]
    csv_text = "content,summary\n" + "".join(f"{r['content']},{r['summary']}\n" for r in rows)
    text = as_lines(rows) if suffix == ".json" else csv_text
    counts = check(tmp_path / f"a{suffix}", text.encode(codec), encoder)
    assert (counts.encoding, counts.has_mark, counts.num_used) == (name, has_mark, 4)
    found = find(counts)
    assert found["duplicate_row"].count == 2
    assert ("encoding" in found) == (name != "UTF-8")
    assert ("byte_order_mark" in found) == (codec == "utf-8-sig")
    if name != "UTF-8":
        assert "iconv -f " in found["encoding"].remedy
        with pytest.raises(DataError, match="iconv"):
            read_rows(tmp_path / f"a{suffix}", FORMAT)


@pytest.mark.parametrize("codec", ["utf-8", "gbk"])
def test_a_damaged_byte_is_located_and_the_rest_is_checked(
    tmp_path: Path, encoder: Encoder, codec: str
) -> None:
    content = as_lines(ROWS * 3).encode(codec) + b'{"content": "\xff", "summary": "b"}\n'
    counts = check(tmp_path / "a.json", content, encoder)
    assert (counts.encoding, counts.num_used) == ("UTF-8" if codec == "utf-8" else "GBK", 7)
    assert counts.damaged_lines == (7,)
    assert find(counts)["encoding"].is_problem


# Columns and files


def test_missing_columns_come_with_the_flags_to_type(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{"question": "甲", "answer": "乙", "id": 1}]
    found = find(check(tmp_path / "a.json", rows, encoder))
    assert set(found) == {"missing_column"}
    assert "question, answer, id" in found["missing_column"].message
    assert found["missing_column"].remedy.endswith(
        "--prompt_column question --response_column answer"
    )
    similar = find(check(tmp_path / "b.json", [{"content": "甲", "sumary": "乙"}], encoder))
    assert similar["missing_column"].remedy.endswith("--response_column sumary")
    unlike = find(check(tmp_path / "c.json", [{"content": "甲", "x": "乙"}], encoder))
    assert unlike["missing_column"].remedy.endswith("--response_column NAME")


def test_a_missing_history_column_does_not_stop_the_check(tmp_path: Path, encoder: Encoder) -> None:
    counts = check(tmp_path / "a.json", ROWS, encoder, replace(FORMAT, history_column="histroy"))
    assert counts.num_used == 2
    assert "--history_column" in find(counts)["missing_column"].remedy


def test_a_history_counts_as_part_of_the_prompt(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{**row(), "history": [["问", "答<eop>"]]}, {**row(), "history": []}]
    counts = check(tmp_path / "a.json", rows, encoder, replace(FORMAT, history_column="history"))
    assert counts.prompt_lengths[0] > counts.prompt_lengths[1] + 5
    assert counts.tallies["control_text"].places == [1]
    assert "duplicate_row" not in counts.tallies


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "content,summary\n", "no rows"),
        ("a.json", b"\x00\x01\x02\xff\n\xfe", "no row can be read; the first fault is"),
        ("a.xlsx", "PK", "use .json, .jsonl or .csv"),
    ],
)
def test_a_file_without_rows_is_unreadable(
    tmp_path: Path, encoder: Encoder, name: str, content: str | bytes, words: str
) -> None:
    found = find(check(tmp_path / name, content, encoder))
    assert set(found) == {"unreadable"}
    assert words in found["unreadable"].message


def test_a_missing_file_is_unreadable(tmp_path: Path, encoder: Encoder) -> None:
    counts = check_file(tmp_path / "none.json", encoder, FORMAT, show_progress=False)
    assert "cannot be read (No such file" in find(counts)["unreadable"].message


def test_the_check_goes_on_after_broken_lines(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "a.json"
    counts = check(path, as_lines(ROWS) + "{broken\n" + as_lines([row(), row([])]), encoder)
    assert (counts.num_used, counts.tallies["broken_row"].places) == (3, [3, 5])
    assert counts.tallies["broken_row"].examples[0].startswith(f"{path}:3: broken JSON")
    csv_file = check(tmp_path / "a.csv", "content,summary\na,b,c\nd,e\n", encoder)
    assert (csv_file.num_used, csv_file.tallies["broken_row"].places) == (1, [2])
    array = check(tmp_path / "b.json", '[{"content":"a","summary":"b"},\n 1,\n{"x": }]', encoder)
    assert (array.num_used, array.tallies["broken_row"].places) == (1, [2, 3])


def test_rows_of_a_one_line_array_are_numbered(tmp_path: Path, encoder: Encoder) -> None:
    found = find(check(tmp_path / "a.json", json.dumps([*ROWS, ROWS[0]]), encoder))
    assert found["duplicate_row"].examples == ("row 3 = row 1",)


# Two files


def test_shared_rows_and_prompts_are_found(tmp_path: Path, encoder: Encoder) -> None:
    first = check(tmp_path / "a.json", [*ROWS, row(), row("丙", "一"), row()], encoder)
    second = check(tmp_path / "b.json", [row("丙", "二"), row("丁"), row()], encoder)
    found = {finding.kind: finding for finding in find_between(first, second)}
    assert set(found) == {"shared_row", "shared_prompt"}
    assert found["shared_row"].count == 1
    assert found["shared_row"].examples == ("line 3 = line 3",)
    assert found["shared_prompt"].examples == ("line 4 = line 1",)
    assert not find_between(first, check(tmp_path / "c.json", [row("戊")], encoder))


# Lengths


def test_cuts_are_those_of_training(
    tmp_path: Path, encoder: Encoder, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row("件" * n, "色" * (30 - n)) for n in range(1, 30)]
    counts = check(tmp_path / "a.json", rows, encoder)
    for limit in (3, 10, 17, 40):
        examples = [to_example(r, FORMAT) for r in rows]
        trained = to_training_batch(
            tokenizer, examples, max_source_length=limit, max_target_length=limit
        )
        prompts = sum(one.prompt_cut for one in trained) / len(rows)
        answers = sum(one.answer_cut for one in trained) / len(rows)
        assert cut_share(counts.prompt_lengths, limit, PROMPT_RESERVE) == prompts
        assert cut_share(counts.answer_lengths, limit, ANSWER_RESERVE) == answers


def test_rows_of_many_chunks_keep_their_lengths(
    tmp_path: Path, encoder: Encoder, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row(f"{n}", "色" * (n % 7 + 1)) for n in range(CHUNK_ROWS + 5)]
    counts = check(tmp_path / "a.json", rows, encoder)
    expected = tokenizer.encode_batch([r["summary"] for r in rows])
    assert counts.answer_lengths.tolist() == [len(ids) for ids in expected]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50), st.integers(3, 2000))
def test_the_length_that_is_advised_suffices(lengths: list[int], limit: int) -> None:
    array = np.array(lengths)
    advised = sufficient_limit(array, limit, ANSWER_RESERVE)
    assert cut_share(array, advised, ANSWER_RESERVE) <= 0.01


# Anything at all

_texts = st.text(max_size=12) | st.sampled_from(["<eop>", "<UNK>", "\ufffd", "\u200b", "龘", " "])
_row_lists = st.lists(
    st.fixed_dictionaries(
        {}, optional={"content": _texts | st.none() | st.integers(), "summary": _texts, "x": _texts}
    ),
    max_size=6,
)
_contents = st.one_of(
    st.binary(max_size=200),
    _row_lists.map(lambda rows: json.dumps(rows).encode("utf-8")),
    st.tuples(
        _row_lists, st.sampled_from(["utf-8", "gb18030", "utf-16", "utf-8-sig"]), st.binary(max_size=3)
    ).map(lambda t: as_lines(t[0]).encode(t[1], "replace") + t[2]),
    st.text(alphabet='{}[]",:\\u019aeE.-+\n\r contesumary\ud800', max_size=80).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
)  # fmt: skip


@given(content=_contents, suffix=st.sampled_from([".json", ".jsonl", ".csv", ".txt"]))
@example(content=b'content,summary\n"x"y,1\na,b\n', suffix=".csv")
@example(content=b'"content"x,summary\na,b\n', suffix=".csv")
@example(content=b"content,summary\na\x00,b\n", suffix=".csv")
@example(content=b'{"\\ud800": "b", "content": "\\ud800", "summary": 1}', suffix=".json")
@example(content=b"[" * 100_000, suffix=".json")
@example(content=b"\xff\xfe\x00", suffix=".json")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_a_report(
    tmp_path: Path, encoder: Encoder, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"any{suffix}"
    counts = check(path, content, encoder)
    report = FileReport(counts, find_in_file(counts))
    kinds = {finding.kind for finding in report.findings}
    assert kinds <= {*PROBLEMS, *NOTICES}
    assert ("unreadable" in kinds) == (counts.num_read == 0)
    assert all(message.startswith(f"{path}:") for message in counts.tallies["broken_row"].examples)
    assert file_as_text(report).startswith(str(path))
    pair = PairReport("a", "b", find_between(counts, counts))
    assert pair_as_text(pair).startswith("a and b\n")
    json.dumps(as_values([report], [pair], FORMAT, "t"))
    assert all(finding.count >= 1 and finding.remedy for finding in report.findings)
    _agrees_with_training(path, counts)


def _agrees_with_training(path: Path, counts: FileCounts) -> None:
    """Training refuses a file exactly if the check found what stops training; else rows agree."""
    stops = counts.unreadable is not None or counts.num_broken or counts.missing_columns()
    stops = stops or counts.encoding != "UTF-8" or counts.damaged_lines
    try:
        rows = read_rows(path, FORMAT)
    except DataError:
        assert stops
    else:
        assert not stops
        assert (rows.num_read, len(rows.kept)) == (counts.num_read, counts.num_used)


def test_the_real_file_is_known(shared: Path, real_tokenizer: ChatGLMTokenizer) -> None:
    path = shared / "data" / "AdvertiseGen" / "dev.json"
    counts = check_file(path, Encoder.of(real_tokenizer), FORMAT, show_progress=False)
    found = find(counts)
    assert counts.num_used == 1070
    assert found["unknown_mark"].count == 300
    assert found["duplicate_row"].examples == ("line 890 = line 889",)
    assert round(cut_share(counts.answer_lengths, 64, ANSWER_RESERVE), 2) == 0.54
