"""Grades of a judge: expected over the digits' odds, read strictly, and missing otherwise."""

import math

import pytest

from ptuning.completions.endpoint import EndpointSource
from ptuning.data.prompts import TextRow
from ptuning.select.judge import grade_of, judge, judge_prompt
from tests.completions.scripted import Reply, as_completion


def chat_logprobs(**odds):
    return {
        "content": [
            {
                "token": max(odds, key=odds.get),
                "logprob": math.log(max(odds.values())),
                "top_logprobs": [
                    {"token": token, "logprob": math.log(value)} for token, value in odds.items()
                ],
            }
        ]
    }


def grades(server, answers, **changes):
    server.script.extend(Reply(200, answer) for answer in answers)
    options = {"api": "chat", "concurrency": 1, "timeout_s": 5.0, "key": None, "key_name": "MY_KEY"}
    source = EndpointSource(server.address, "scripted", **options | changes)
    rows = [TextRow(1, f"问题 {n}", f"回答 {n}") for n in range(len(answers))]
    return dict(judge(source, rows))


def test_the_expected_grade_is_exact(server):
    odds = {"4": 0.5, "5": 0.3, " 5": 0.1, "3": 0.05, "好": 0.05}
    expected = (4 * 0.5 + 5 * 0.4 + 3 * 0.05) / 0.95
    found = grades(server, [as_completion("4", chat_logprobs(**odds))])
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert server.asked[0].body["top_logprobs"] == 20
    assert server.asked[0].body["temperature"] == 0


def test_a_refusal_is_missing_though_it_has_digits_among_its_odds(server):
    refusal = as_completion("I refuse", chat_logprobs(I=0.9, **{"3": 0.1}))
    found = grades(server, [refusal, as_completion("6"), as_completion("4.5"), as_completion(None)])
    assert found == {0: None, 1: 6.0, 2: None, 3: None}


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        *(("3", 3.0), (" 5\n", 5.0), ("4分", 4.0), ("2.", 2.0), ("1。", 1.0)),
        *((text, None) for text in ("", "7", "0", "12", "3 or 4", "我给 4", "four", "4/6", "-3")),
        (None, None),
    ],
)
def test_replies_are_read_strictly(text, grade):
    assert grade_of(text) == grade


def test_odds_of_another_first_token_do_not_count():
    assert grade_of("\n4", {"\n": -0.01, "2": -5.0}) == 4.0


def test_the_judge_reads_earlier_turns_in_the_language_of_the_answer():
    row = TextRow(1, "And now?", "Now it is {late}.", (("What time is it?", "Early."),))
    prompt = judge_prompt(row)
    assert "User: What time is it?\nAssistant: Early.\nUser: And now?\n" in prompt
    assert "Now it is {late}." in prompt
    assert prompt.endswith("Reply with the number alone:")
    assert judge_prompt(TextRow(1, "现在呢？", "很晚了。")).endswith("只回复一个数字：")


def test_a_judge_that_gives_no_grade_is_given_up(server):
    server.answer = lambda asked: Reply(200, as_completion("It is a 5."))
    options = {"api": "chat", "concurrency": 2, "timeout_s": 5.0, "key": None, "key_name": "MY_KEY"}
    source = EndpointSource(server.address, "scripted", **options)
    rows = [TextRow(1, f"问题 {n}", "回答") for n in range(200)]
    with pytest.raises(ValueError, match="no grade in 20 replies, such as 'It is a 5"):
        list(judge(source, rows))
    assert len(server.asked) < 40
    assert list(judge(source, rows[:19])) != []


def test_the_completions_api_takes_five_log_probabilities(server):
    grades(server, [as_completion("4")], api="completions")
    assert server.asked[0].body["logprobs"] == 5


def test_odds_that_vanish_leave_the_digit():
    assert grade_of("4", {"4": -9999.0}) == 4.0
