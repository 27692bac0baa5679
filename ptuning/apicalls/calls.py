"""Read the API calls in a text with Python's own parser; nothing is ever executed.

Models' answers are seldom whole programs: the call stands between tags, in a pseudo dictionary
with unescaped quotes, or in prose. What does not parse as a whole is scanned for `dotted.name(`,
and each balanced segment is parsed alone.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_CHARACTERS = 50_000  # of an answer that are read; published ones have at most 4,000
MAX_SCANNED = 1_000_000  # characters read in search of closing brackets, all segments together
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # all that ast.parse raises
_NAME = r"[^\W\d]\w*+"
# Possessive (+), and without the bracket too, so that no character is tried twice.
_CALLEE = re.compile(rf"{_NAME}(?:\s*+\.\s*+{_NAME})*+\s*+(?P<bracket>\()?")
_PARTS = re.compile(  # a whole text in quotes, or what counts outside of them
    r"""(?s:('''|\"\"\"|'|")(?:\\.|(?!\1).)*+\1)|[()\[\]{},'"]"""
)
_KEYWORD = re.compile(rf"\s*+{_NAME}\s*+=(?!=)")


class Argument(NamedTuple):
    """An argument's value, or its source if it is no literal; key says which, and is compared."""

    key: str
    value: Any


class Call(NamedTuple):
    """A call of a plain dotted name; keywords by name, `**` for a double-starred one.

    source is the call on one line as Python writes it: quotes and blanks need not be as given.
    """

    callee: str
    positional: tuple[Argument, ...] = ()
    keywords: tuple[tuple[str, Argument], ...] = ()
    source: str = ""

    @property
    def values(self) -> list[Argument]:
        """All arguments, without their names."""
        return [*self.positional, *(value for _, value in self.keywords)]

    def named(self, parameters: tuple[str, ...]) -> dict[str, Argument]:
        """Return the arguments by name; parameters are the names of positional ones, in order.

        A positional argument beyond them gets its number from 1.
        """
        names = [*parameters, *(str(n + 1) for n in range(len(parameters), len(self.positional)))]
        return dict(zip(names, self.positional, strict=False)) | dict(self.keywords)


class FoundCalls(NamedTuple):
    """What was read of an answer. looks_called: it has a name with a bracket, readable or not."""

    calls: tuple[Call, ...]
    has_tag: bool
    looks_called: bool


def find_calls(text: str) -> FoundCalls:
    """Return the calls of an answer: those of its api_call, or of the whole text without one.

    >>> find_calls("<<<api_call>>>: shop.title(repo='a/b')").calls[0].callee
    'shop.title'
    """
    _, tag, called = text[:MAX_CHARACTERS].partition("api_call")
    part = called.partition("api_provider")[0] if tag else text[:MAX_CHARACTERS]
    states = list(_unescaped(part))
    for state in states:
        calls = calls_of(state)
        if calls:
            return FoundCalls(calls, bool(tag), True)
    calls, looks_called = _scan(states[-1])
    return FoundCalls(calls, bool(tag), looks_called)


def _unescaped(text: str) -> Iterator[str]:
    """Yield the text as it is, and without one more layer of backslashes, up to three times."""
    yield text
    for _ in range(3):
        plain = text.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"')
        plain = re.sub(r"\\(?=\W)", "", plain)
        if plain == text:
            return
        text = plain
        yield text


def calls_of(source: str) -> tuple[Call, ...]:
    """Return the calls of Python source, () if it is none."""
    try:
        tree = ast.parse(source.strip())
    except _UNREADABLE:
        return ()
    return tuple(_to_calls(tree))


def _to_calls(tree: ast.AST) -> Iterator[Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (callee := _dotted(node.func)):
            positional = tuple(map(_to_argument, node.args))
            keywords = tuple((word.arg or "**", _to_argument(word.value)) for word in node.keywords)
            yield Call(callee, positional, keywords, _unparsed(node))


def _dotted(node: ast.expr) -> str:
    """Return a.b.c for a plain dotted name, "" for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def _to_argument(node: ast.expr) -> Argument:
    try:
        literal = ast.literal_eval(node)
        return Argument(f"{type(literal).__name__}: {literal!r}", literal)
    except (*_UNREADABLE, TypeError):
        source = _unparsed(node)
        return Argument(source, source)


def _unparsed(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except (RecursionError, ValueError):  # nested too deep, or a number of 4,300 digits
        return f"{_dotted(node.func)}(...)" if isinstance(node, ast.Call) else "..."


def _scan(text: str) -> tuple[tuple[Call, ...], bool]:
    """Return the calls of all segments `dotted.name(...)` that parse, and if there is any segment.

    A segment may lie within another, and within quotes.
    """
    calls: list[Call] = []
    budget, starts = MAX_SCANNED, [one for one in _CALLEE.finditer(text) if one["bracket"]]
    for callee in starts:
        end, _ = _brackets(text, callee.end() - 1, callee.end() + budget)
        budget -= (end or len(text)) - callee.end()
        if end is not None:
            segment = text[callee.start() : end]
            calls += calls_of(segment) or calls_of(without_late_positionals(segment))
    return tuple(calls), bool(starts)


def _brackets(text: str, start: int, limit: int) -> tuple[int | None, list[int]]:
    """Return the index after the bracket that balances the one at start, None without it.

    Also the indices of the commas between its arguments.
    """
    depth = 0
    commas: list[int] = []
    for part in _PARTS.finditer(text, start, max(limit, start)):
        sign = part[0]
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth == 0:
                return part.end(), commas
        elif sign == "," and depth == 1:
            commas.append(part.start())
        elif sign in ("'", '"'):  # nothing closes it
            break
    return None, commas


def without_late_positionals(segment: str) -> str:
    """Return a call without plain positional arguments after keywords, which Python refuses.

    >>> without_late_positionals("load(repo='a', 'b', model='c')")
    "load(repo='a', model='c')"
    """
    start = segment.index("(")
    _, commas = _brackets(segment, start, len(segment))
    kept: list[str] = []
    for begin, end in itertools.pairwise([start, *commas, len(segment) - 1]):
        part = segment[begin + 1 : end]
        is_positional = not _KEYWORD.match(part) and not part.lstrip().startswith("*")
        if not (is_positional and any(map(_KEYWORD.match, kept))):
            kept.append(part)
    return f"{segment[:start]}({','.join(kept)})"
