"""Calls in answers of any form; hostile answers end at once and execute nothing."""

import sys
import time
from typing import Any

import pytest

from ptuning.apicalls.calls import Call, calls_of, find_calls, without_late_positionals


def callees(text: str) -> list[str]:
    return [call.callee for call in find_calls(text).calls]


def one(source: str) -> Call:
    (call,) = calls_of(source)
    return call


@pytest.mark.parametrize(
    "text",
    [
        "<<<api_call>>>: shop.find('red', size=3)\n<<<api_provider>>>: x",
        "{'api_call': \"x = shop.find('red', size=3)\", 'api_provider': 'x'}",
        "<<<api_call>>>: shop.find(\\'red\\', size=3)\\n<<<api_provider>>>: x",
        "<<<api_call>>>: shop.find(\\\\\\'red\\\\\\', size=3)",
        "Type shop . find ('red',\n  size=3) for this.",
        "import shop\nshop.find('red', size=3)",
    ],
)
def test_one_call_in_every_form(text: str) -> None:
    (call,) = find_calls(text).calls
    assert (call.callee, [argument.value for argument in call.values]) == ("shop.find", ["red", 3])


def test_only_what_the_tags_enclose_is_read() -> None:
    found = find_calls("a.b(1) <<<api_call>>>: c.d(2) <<<api_provider>>>: e.f(3)")
    assert (found.has_tag, [call.callee for call in found.calls]) == (True, ["c.d"])
    assert not find_calls("c.d(2)").has_tag


def test_calls_inside_others_and_inside_texts_are_found() -> None:
    assert callees("tf.keras.Sequential([hub.KerasLayer('u')])") == [
        "tf.keras.Sequential",
        "hub.KerasLayer",
    ]
    assert callees("no code: 'hub.load(1)'") == ["hub.load"]


def test_values_are_compared_with_their_types() -> None:
    keys = {argument.key for argument in one("f(1, 1.0, True, '1', x, -1, [1])").values}
    assert keys == {"int: 1", "float: 1.0", "bool: True", "str: '1'", "x", "int: -1", "list: [1]"}
    assert one("f('a')").values == one('f("a")').values


def test_arguments_by_name() -> None:
    named = one("f('a', 'b', 'c', d=1)").named(("x", "y"))
    assert {name: argument.value for name, argument in named.items()} == {
        **{"x": "a", "y": "b", "3": "c"},
        "d": 1,
    }


def test_positional_arguments_after_keywords_are_dropped() -> None:
    source = "load(r='a, (b', 'm', *args, k=[1, 2], x == 1)"
    assert without_late_positionals(source) == "load(r='a, (b', *args, k=[1, 2])"
    assert [a.value for a in find_calls("load(r='a', 'b', model='c')").calls[0].values] == [
        "a",
        "c",
    ]


@pytest.mark.parametrize(
    ("text", "looks_called"),
    [("", False), ("there is none", False), ("f(1", True), ("f(1))(", True), ("f()(", True)],
)
def test_what_is_no_call(text: str, looks_called: bool) -> None:
    found = find_calls(text)
    assert found.looks_called is looks_called
    assert [call.callee for call in found.calls] == (["f"] if ")" in text else [])


HOSTILE: dict[str, tuple[str, bool]] = {
    "a megabyte of brackets": ("(" * 1_000_000, False),
    "open calls": ("f(" * 100_000, False),
    "open lists after the tag": ("<<<api_call>>>: " + "[" * 5_000, False),
    "NUL bytes": ("\0" * 100_000 + "f(\0)", False),
    "open quotes": ("f('" * 30_000, False),
    "names with blanks": ("a . " * 30_000 + "(", False),
    "one long name": ("f" * 100_000 + "!", False),
    "a chain of attributes": ("a." * 30_000 + "b(1)", False),
    "minus signs": ("-" * 40_000 + "f(1)", True),
    "escaped quotes": ("f(\\\\'" * 9_000, False),
    "backslashes": ("\\" * 100_000 + "f(", False),
    "deep nesting": ("f(" * 90 + ")" * 90, True),
    "a surrogate": ("f('\ud800')", False),
    "commas": ("f(a=1," + "," * 40_000 + ")", True),
    "an import": ("__import__('os').system('touch /tmp/pwned'); __import__('os')", True),
    "an assignment": ("(x := __import__('os')).remove('/')\nopen('x', 'w')", True),
}


class Watch:
    """An audit hook, which cannot be removed; it notes what execution would do while it is on."""

    watched = ("exec", "open", "import", "os.", "subprocess.", "socket.", "ctypes.")

    def __init__(self) -> None:
        self.is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an event; Python's parser itself looks for the line of an error in this file."""
        is_parser = event == "open" and arguments[0] == "<unknown>"
        if self.is_on and event.startswith(self.watched) and not is_parser:
            self.seen.append(event)

    def __enter__(self) -> list[str]:
        self.seen.clear()
        self.is_on = True
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.is_on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_end_at_once_and_execute_nothing(name: str, watch: Watch) -> None:
    text, has_call = HOSTILE[name]
    find_calls("warm(1)")
    started_s = time.process_time()
    with watch as seen:
        found = find_calls(text)
    assert time.process_time() - started_s < 1
    assert bool(found.calls) is has_call
    assert seen == []


def test_the_hook_sees_execution(watch: Watch) -> None:
    with watch as seen:
        exec("1 + 1")
    assert "exec" in seen
