"""Questions of the page to one or two models: what comes back, in which pane, and stopping."""

import time
from itertools import pairwise

import pytest

from ptuning.serve.session import UnknownPrefixError
from ptuning.serve.web_talk import EMPTY, TalkOptions, WebTalk, take_back
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
    steps = list(talk.ask("v", EMPTY, "你好", ["other"], TalkOptions()))
    answer = talk.session.chat("你好", prefix="other").read()
    assert steps[-1].panes == ((("你好", answer),), ())
    assert [step.finished for step in steps] == [False] * (len(steps) - 1) + [True]
    shown = [step.panes[0][0][1] for step in steps]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert "other: " in steps[-1].status


def test_two_models_answer_side_by_side(talk):
    end = last(talk.ask("v", EMPTY, "类型#裤*版型#宽松", ["adgen", "base"], TalkOptions()))
    expected = [
        talk.session.chat("类型#裤*版型#宽松", prefix=name).read() for name in ("adgen", "base")
    ]
    assert [turns[-1][1] for turns in end.panes] == expected
    assert expected[0] != expected[1]


def test_earlier_turns_are_sent_only_when_asked(talk):
    before = ((("你好", "您好！"),), ())
    alone = last(talk.ask("v", before, "谢谢", ["base"], TalkOptions(send_history=False)))
    chat = last(talk.ask("v", before, "谢谢", ["base"], TalkOptions(send_history=True)))
    assert alone.panes[0] == (("你好", "您好！"), ("谢谢", talk.session.chat("谢谢").read()))
    assert chat.panes[0][1][1] == talk.session.chat("谢谢", before[0]).read()


def test_history_that_does_not_fit_is_said(talk):
    long = tuple((f"类型#裤*版型#宽松{i}", "宽松版型藏肉又自在。" * 4) for i in range(8))
    end = last(talk.ask("v", (long, ()), "你好", ["adgen"], TalkOptions(send_history=True)))
    notice = talk.session.chat("你好", long, "adgen").notice
    assert notice is not None
    assert notice in end.status


def test_stop_ends_the_computation_and_keeps_the_text(talk, slow_engine):
    steps = talk.ask(
        "v", EMPTY, "你好", ["chatty"], TalkOptions(temperature=1.0, max_new_tokens=500)
    )
    while not next(steps).panes[0][0][1]:
        pass
    talk.stop("somebody else")
    assert not next(steps).finished
    talk.stop("v")
    end = last(steps)
    assert "stopped" in end.status
    assert end.panes[0][0][1]
    until_s = time.monotonic() + 5
    while talk.session.scheduler.num_rows and time.monotonic() < until_s:
        time.sleep(0.01)
    assert talk.session.scheduler.num_rows == 0


def test_a_new_question_stops_the_old_one(talk, slow_engine):
    options = TalkOptions(temperature=1.0, max_new_tokens=500)
    old = talk.ask("v", EMPTY, "你好", ["chatty"], options)
    next(old)
    new = talk.ask("v", EMPTY, "谢谢", ["chatty"], options)
    next(new)
    assert last(old).finished
    assert not next(new).finished
    talk.stop("v")
    assert last(new).finished


def test_a_page_that_went_away_leaves_no_row(talk, slow_engine):
    steps = talk.ask(
        "v", EMPTY, "你好", ["chatty"], TalkOptions(temperature=1.0, max_new_tokens=500)
    )
    next(steps)
    steps.close()
    until_s = time.monotonic() + 5
    while talk.session.scheduler.num_rows and time.monotonic() < until_s:
        time.sleep(0.01)
    assert talk.session.scheduler.num_rows == 0


def test_unknown_model_is_an_error(talk):
    with pytest.raises(UnknownPrefixError, match="nobody"):
        next(talk.ask("v", EMPTY, "你好", ["nobody"], TalkOptions()))


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
