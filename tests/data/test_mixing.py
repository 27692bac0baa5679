"""General rows beside a task's: the form of --mix, the share, the draw, and the rows themselves."""

from pathlib import Path

import pytest

from ptuning.data.mixing import MixSource, parse_mix


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("general.jsonl:0.2", MixSource(Path("general.jsonl"), 0.2)),
        (r"C:\data\g.jsonl:.5", MixSource(Path(r"C:\data\g.jsonl"), 0.5)),
        (
            r"C:\g.csv:0.25:instruction, output",
            MixSource(Path(r"C:\g.csv"), 0.25, ("instruction", "output")),
        ),
        ("a:b.json:0.1:问,答,history", MixSource(Path("a:b.json"), 0.1, ("问", "答", "history"))),
    ],
)
def test_the_form_is_read_from_the_right(text, wanted):
    assert parse_mix(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("general.jsonl", "FILE:RATIO"),
        (":0.2", "FILE:RATIO"),
        ("general.jsonl:", "FILE:RATIO"),
        (r"C:\g.jsonl", "FILE:RATIO"),
        ("g.jsonl:0.2:prompt", "PROMPT,RESPONSE"),
        ("g.jsonl:0.2:a,b,c,d", "PROMPT,RESPONSE"),
        ("g.jsonl:0.2:a,,b", "PROMPT,RESPONSE"),
        ("g.jsonl:0", "between 0 and 1"),
        ("g.jsonl:1", "between 0 and 1"),
        ("g.jsonl:20", "between 0 and 1"),
        ("g.jsonl:-0.2", "between 0 and 1"),
        ("g.jsonl:nan", "between 0 and 1"),
    ],
)
def test_another_form_is_told(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse_mix(text)
    assert text in str(caught.value)
