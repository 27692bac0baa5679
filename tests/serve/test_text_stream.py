"""Streams of any tokens join to the text of all of them, and nothing given out is taken back."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.serve.text_stream import TextStream, clean_response
from ptuning.tunings.loading import NANO_DIR

TEXTS = [
    "你好,world! 我的知识截至[[训练时间]]; ok?",
    "[[[训练时间]],好:的 [[训练 时间]]",
    "  头发🙂‍↔️和 𠮷  \n\n\t制表<n>符<|blank_3|>   尾  \n",
    "a,,中,,b!?好 3:2 领先:好!",
    "<|tab|<n<|blank_80|>x",
]


@pytest.fixture(scope="module", params=["nano", "published"])
def tokenizer(request):
    if request.param == "nano":
        return ChatGLMTokenizer.from_pretrained(NANO_DIR)
    shared = request.getfixturevalue("shared")
    return ChatGLMTokenizer(shared / "data" / "chatglm-6b" / "ice_text.model")


def streamed(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    pieces = [stream.add([token]) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    at_once = TextStream(tokenizer, **options)
    assert at_once.add(ids) + at_once.finish() == stream.text
    assert at_once.num_tokens == stream.num_tokens
    return pieces, stream


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_is_or_cleaned(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert streamed(tokenizer, ids, clean=False)[1].text == whole
    pieces, stream = streamed(tokenizer, ids, clean=True)
    assert stream.text == clean_response(whole)
    assert not any("\ufffd" in piece for piece in pieces)


def random_ids(tokenizer, rng):
    """Letters, marks and bytes of TEXTS, and now and then any token at all."""
    known = [i for t in TEXTS for i in tokenizer(t, add_special_tokens=False)["input_ids"]]
    return [
        rng.choice(known) if rng.random() < 0.7 else rng.randrange(len(tokenizer))
        for _ in range(rng.randrange(1, 60))
    ]


def test_any_tokens_join_to_their_text(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        ids = random_ids(tokenizer, rng)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert streamed(tokenizer, ids, clean=False)[1].text == whole
        pieces, stream = streamed(tokenizer, ids, clean=True)
        assert stream.text == clean_response(whole.rstrip("\ufffd"))
        assert sum(map(bool, pieces)) <= stream.num_tokens + 1


def test_most_tokens_are_given_out_at_once(tokenizer):
    ids = tokenizer("这款裤子是白色的宽松版型穿着舒适" * 8, add_special_tokens=False)["input_ids"]
    pieces, _ = streamed(tokenizer, ids)
    assert sum(map(bool, pieces)) > 0.8 * len(ids)


def test_decoding_stays_cheap_however_long_the_answer(tokenizer, monkeypatch):
    ids = tokenizer("这款裤子是白色的宽松版型。" * 60, add_special_tokens=False)["input_ids"]
    longest = 0
    decode = tokenizer.decode

    def watched(token_ids, **options):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids, **options)

    monkeypatch.setattr(tokenizer, "decode", watched)
    stream = TextStream(tokenizer)
    for token in ids:
        stream.add([token])
    assert longest <= 20


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["白色"], "裤子是"),
        (["色的宽", "宽松"], "裤子是白"),
        (["没有", ""], "裤子是白色的宽松版型"),
    ],
)
def test_stop_strings_are_never_shown(tokenizer, stop, expected):
    ids = tokenizer("裤子是白色的宽松版型", add_special_tokens=False)["input_ids"]
    pieces, stream = streamed(tokenizer, ids, stop=stop)
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != "裤子是白色的宽松版型")


# The clean-up against a two-pass reading of the published rule


WIDE = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}


def mark_by_mark(text: str) -> str:
    """Widen one mark after the other, first behind and then before Chinese."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for narrow, wide in WIDE.items():
        text = re.sub(f"([\u4e00-\u9fff]){re.escape(narrow)}", f"\\1{wide}", text)
        text = re.sub(f"{re.escape(narrow)}([\u4e00-\u9fff])", f"{wide}\\1", text)
    return text


@given(st.text("中文,!:;?，a1 .\n[]训练时间"))
def test_one_pass_does_what_mark_by_mark_does(text: str) -> None:
    assert clean_response(text) == mark_by_mark(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\n 好 \n", "好"),
        ("截至[[训练时间]],", "截至2023年，"),
        ("a,b:c;d?e!", "a,b:c;d?e!"),
        ("中,a", "中，a"),
        ("a,中", "a，中"),
        ("中,,中", "中，，中"),
        ("好.", "好."),
        ("カ,カ", "カ,カ"),
        ("", ""),
    ],
)
def test_marks_are_widened_only_beside_chinese(text: str, clean: str) -> None:
    assert clean_response(text) == clean
