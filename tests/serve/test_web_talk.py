"""Questions of the page to one or two models: what comes back, in which pane, and stopping."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.apicalls.pairs import prompt_maker
from ptuning.serve.session import UnknownPrefixError
from ptuning.serve.web_talk import (
    EMPTY,
    WebTalk,
    join_attributes,
    parse_attributes,
    take_back,
    to_messages,
)
from tests.serve.live_server import wait_until_idle
from tests.serve.slow_engine import slow_down


@pytest.fixture
def talk(session):
    return WebTalk(session)


@pytest.fixture
def slow_engine(session, monkeypatch):
    slow_down(session, monkeypatch)


def last(steps):
    *_, end = steps
    return end


def test_one_model_fills_the_first_pane_in_pieces(talk):
    steps = list(talk.ask("v", EMPTY, "你好", ["other"]))
    answer = talk.session.chat("你好", prefix="other").read()
    assert steps[-1].panes == ((("你好", answer),), ())
    assert [step.finished for step in steps] == [False] * (len(steps) - 1) + [True]
    shown = [step.panes[0][0][1] for step in steps]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert "other: " in steps[-1].status


def test_two_models_answer_side_by_side(talk):
    end = last(talk.ask("v", EMPTY, "类型#裤*版型#宽松", ["adgen", "base"]))
    expected = [
        talk.session.chat("类型#裤*版型#宽松", prefix=name).read() for name in ("adgen", "base")
    ]
    assert [turns[-1][1] for turns in end.panes] == expected
    assert expected[0] != expected[1]


def test_earlier_turns_are_sent_only_when_asked(talk):
    before = ((("你好", "您好！"),), ())
    alone = last(talk.ask("v", before, "谢谢", ["base"], send_history=False))
    chat = last(talk.ask("v", before, "谢谢", ["base"], send_history=True))
    assert alone.panes[0] == (("你好", "您好！"), ("谢谢", talk.session.chat("谢谢").read()))
    assert chat.panes[0][1][1] == talk.session.chat("谢谢", before[0]).read()


def test_history_that_does_not_fit_is_said(talk):
    long = tuple((f"类型#裤*版型#宽松{i}", "宽松版型藏肉又自在。" * 4) for i in range(8))
    end = last(talk.ask("v", (long, ()), "你好", ["adgen"], send_history=True))
    notice = talk.session.chat("你好", long, "adgen").notice
    assert notice is not None
    assert notice in end.status


def test_stop_ends_the_computation_and_keeps_the_text(talk, slow_engine):
    steps = talk.ask("v", EMPTY, "你好", ["chatty"], temperature=1.0, max_new_tokens=500)
    while not next(steps).panes[0][0][1]:
        pass
    talk.stop("somebody else")
    assert not next(steps).finished
    talk.stop("v")
    end = last(steps)
    assert "stopped" in end.status
    assert end.panes[0][0][1]
    wait_until_idle(talk.session)


def test_a_new_question_stops_the_old_one(talk, slow_engine):
    options = {"temperature": 1.0, "max_new_tokens": 500}
    old = talk.ask("v", EMPTY, "你好", ["chatty"], **options)
    next(old)
    new = talk.ask("v", EMPTY, "谢谢", ["chatty"], **options)
    next(new)
    assert last(old).finished
    assert not next(new).finished
    talk.stop("v")
    assert last(new).finished


def test_a_page_that_went_away_leaves_no_row(talk, slow_engine):
    steps = talk.ask("v", EMPTY, "你好", ["chatty"], temperature=1.0, max_new_tokens=500)
    next(steps)
    steps.close()
    wait_until_idle(talk.session)


def test_unknown_model_is_an_error(talk):
    with pytest.raises(UnknownPrefixError, match="nobody"):
        next(talk.ask("v", EMPTY, "你好", ["nobody"]))


def test_models_lengths_and_histories_are_as_trained(talk):
    assert talk.models == [*talk.session.prefixes, "base"]
    assert (talk.trained_length("adgen"), talk.trained_length("base")) == (24, 512)
    assert (talk.is_trained_on_chats("adgen"), talk.is_trained_on_chats("base")) == (False, True)


def test_last_question_is_taken_back_from_the_panes_that_show_it():
    both = ((("a", "1"), ("b", "2")), (("b", "3"),))
    assert take_back(both, compare=True) == (((("a", "1"),), ()), "b")
    assert take_back(both, compare=False) == (((("a", "1"),), (("b", "3"),)), "b")
    assert take_back(((("b", "2"),), (("a", "3"),)), compare=True) == (((), (("a", "3"),)), "b")
    assert take_back(EMPTY, compare=True) == (EMPTY, "")


def titles(messages):
    return [message["metadata"]["title"] for message in messages if "metadata" in message]


def test_an_api_call_is_shown_under_its_answer_with_its_verdict(cards):
    turns = (
        ("a", "api_call: shop.title(repo='a/titles')"),
        ("b", "shop.title(repo='<img src=x>')"),
        ("c", "api_call: shop.title("),
        ("d", "宽松"),
    )
    messages = to_messages(turns, cards)
    assert [message["content"] for message in messages] == [
        *("a", turns[0][1], "shop.title(repo='a/titles')"),
        *("b", *["shop.title(repo='&lt;img src=x>')"] * 2),
        *("c", turns[2][1], "—"),
        *("d", "宽松"),
    ]
    assert titles(messages) == [
        "✓ API 调用有效 valid API call: Titles",
        "✗ API 调用无效 invalid API call: 没有这样的取值 no card has these identifying values",
        "✗ API 调用无效 invalid API call: 无法解析 the call is not Python",
    ]
    assert titles(to_messages(turns[:2], cards, finished=False)) == titles(messages)[:1]
    assert titles(to_messages(turns)) == []


def test_a_verdict_never_reaches_the_model(session, cards, answer_with):
    answer_with("<<<api_call>>>: shop.title(repo='a/titles')")
    talk = WebTalk(session, cards)
    end = last(talk.ask("v", EMPTY, "你好", ["base"], max_new_tokens=1))
    assert end.panes == ((("你好", "<<<api_call>>>: shop.title(repo='a/titles')"),), ())


def test_the_model_is_asked_with_documents_that_the_page_does_not_show(session, cards, monkeypatch):
    asked, chat = [], session.chat
    monkeypatch.setattr(
        session,
        "chat",
        lambda question, *a, **k: (asked.append(question), chat(question, *a, **k))[1],
    )
    talk = WebTalk(session, cards, prompt_maker(cards, 1))
    end = last(talk.ask("v", EMPTY, "写标题", ["base"], max_new_tokens=1))
    assert asked == [prompt_maker(cards, 1)("写标题")]
    assert asked[0].startswith('写标题\n参考以下 API 文档：\n{"domain"')
    assert end.panes[0][0][0] == "写标题"


# The attribute editor: text to rows and back


WORDS = st.text(alphabet="类型裤版宽松 abc1", min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_rows_survive_the_way_to_a_string_and_back(rows):
    assert parse_attributes(join_attributes(rows)) == rows


def test_a_key_may_come_twice_and_a_value_may_hold_the_pair_sign():
    rows = [("裙款式", "拼接"), ("裙款式", "口袋"), ("图案", "#1")]
    assert join_attributes(rows) == "裙款式#拼接*裙款式#口袋*图案##1"
    assert parse_attributes(join_attributes(rows)) == rows


@pytest.mark.parametrize(
    "text", ["", "你好", "类型#", "#裤", "类型#裤*", "类型#裤**版型#宽松", "a*b"]
)
def test_other_text_is_no_table(text):
    assert parse_attributes(text) is None


@pytest.mark.parametrize(
    "rows", [[], [["", ""]], [[None, None]], [["类型", ""]], [["", "裤"]], [["类型"]], [[]]]
)
def test_rows_without_key_or_value_are_left_out(rows):
    assert join_attributes([*rows, ["版型", "宽松"]]) == "版型#宽松"


@pytest.mark.parametrize("row", [("类#型", "裤"), ("类型", "裤*裙"), ("类*型", "裤")])
def test_a_separating_sign_is_refused_by_name(row):
    with pytest.raises(ValueError, match="separates attributes"):
        join_attributes([row])
