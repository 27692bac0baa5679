"""Questions with their API calls, as rows to train a prefix on.

Trained on the right document alone, a model copies whatever document it gets; so some rows have
only wrong ones (RAFT, Zhang et al. 2024, https://arxiv.org/abs/2403.10131, section 3), and in some
the names that identify the API are replaced by invented ones in document and answer alike, so that
the call is read from the document and not remembered.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from ptuning.apicalls.calls import find_calls
from ptuning.apicalls.cards import NO_API, Card, Cards
from ptuning.apicalls.retrieval import PublishedRetriever, Retriever
from ptuning.data.conversion import ContractRow
from ptuning.data.formats import UnknownColumns
from ptuning.data.parsing import open_data, write_json
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError, RawRow
from ptuning.data.reading import read_raw_rows, read_rows
from ptuning.data.segmentation import language_of

HEADINGS = {"zh": "参考以下 API 文档：", "en": "Use this API documentation for reference:"}
DOMAIN, CALL, PROVIDER, EXPLANATION, CODE = TAGS = (
    *("domain", "api_call", "api_provider", "explanation", "code"),
)
BM25, ORACLE = RETRIEVERS = ("bm25", "oracle")
MIN_VARIED = 4  # characters of a name; shorter ones occur in other words too
_NAMES = "|".join(TAGS)
_TAG = re.compile(rf"<<<(?P<name>{_NAMES})>>>\s*+:?")
_KEY = re.compile(rf"['\"](?P<name>{_NAMES})['\"]\s*+:")
_NO_INPUT = r"(?:[#,\s]*+['\"]?Input['\"]?\s*+:\s*+['\"]?<noinput>['\"]?)?"
_OUTPUT = re.compile(_NO_INPUT + r"[#,\s]*+['\"]?Output['\"]?\s*+:")


class ApiPair(NamedTuple):
    """A question and its answer by tag; card is the index of its API, None where none fits."""

    question: str
    answer: dict[str, str]
    card: int | None


class DocumentSettings(NamedTuple):
    """Which documents training prompts show; p, vary: shares of the rows.

    retriever None: none. p: the right document is among them. distractors: number of wrong ones,
    the likeliest for bm25, any for oracle. vary: its identifying names are replaced. copies: rows
    of each question, each with documents of its own.
    """

    retriever: str | None
    p: float = 0.8
    distractors: int = 2
    vary: float = 0.5
    copies: int = 1
    seed: int = 42


def read_tags(text: str) -> dict[str, str]:
    r"""Return the tags of an answer in any of the published forms.

    >>> read_tags("<<<domain>>>: Text, <<<api_call>>>: f('a')")
    {'domain': 'Text', 'api_call': "f('a')"}
    >>> read_tags("{'domain': 'Text', 'api_call': \"f('a')\"}")
    {'domain': 'Text', 'api_call': "f('a')"}
    """
    tags = list(_TAG.finditer(text)) or list(_KEY.finditer(text))
    found: dict[str, str] = {}
    for tag, following in itertools.zip_longest(tags, tags[1:]):
        end = None if following is None else following.start()
        value = text[tag.end() : end].strip().rstrip(",").rstrip()
        if tag.re is _KEY:
            value = value.rstrip("},\n ")
            is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            value = (value[1:-1] if is_quoted else value).replace("\\n", "\n").strip()
        if value:
            found.setdefault(tag["name"], value)
    return {name: found[name] for name in TAGS if name in found}


def write_tags(answer: dict[str, str]) -> str:
    """Write an answer as one tag on each line, the one form that is trained."""
    return "\n".join(f"<<<{name}>>>: {answer[name]}" for name in TAGS if answer.get(name))


def read_pairs(path: Path, cards: Cards) -> tuple[list[ApiPair], list[int]]:
    """Return the pairs of a file, and the lines left out: no answer, or a call of no card.

    A row is Gorilla's {code, api_call, provider, api_data}, or in any format of data files with a
    call, an answer by tags, or None as its answer.
    """
    rows = read_raw_rows(open_data(path), None)
    lines: list[int] = []
    if rows and all({"code", CALL} <= row.columns.keys() for row in rows):
        own: dict[str, int] = {}  # cards may share a call: then api_data says which one is meant
        for index, card in reversed([*enumerate(cards)]):
            own |= {card.api_call: index, write_json(card.fields): index}
        found = [(row.line, _of_published(row, own, cards)) for row in rows]
    else:
        try:
            read = read_rows(path, RowFormat())
        except UnknownColumns as error:
            needed = "pairs need columns prompt and response, or Gorilla's code and api_call."
            raise DataError(path, None, needed) from error
        found = [(row.line, _of_answer(row.prompt, row.response, cards)) for row in read.kept]
        lines = [line for dropped in read.dropped.values() for line in dropped]
    pairs = [pair for _, pair in found if pair is not None]
    if not pairs:
        raise DataError(path, None, "has no row whose answer calls an API of the cards.")
    return pairs, sorted(lines + [line for line, pair in found if pair is None])


def pairs_of_cards(cards: Cards) -> list[ApiPair]:
    """Return the pairs of the field "questions" of each card."""
    return [
        ApiPair(question, _answer_of(card, {}), index)
        for index, card in enumerate(cards)
        for question in card.fields.get("questions", [])
    ]


def _of_published(row: RawRow, own: Mapping[str, int], cards: Cards) -> ApiPair | None:
    given, *rest = _OUTPUT.split(str(row.columns["code"]), maxsplit=1)
    around = " \n'\"" if given.startswith("{") else None  # elsewhere, quotes are the question's
    question, output = re.sub(r"^\W*Instruction\W*?:", "", given).strip(around), "".join(rest)
    call = str(row.columns[CALL])
    index = own.get(write_json(row.columns.get("api_data")), own.get(call))
    if index is None or not question:
        return _of_answer(question, output, cards) if question else None
    tags = read_tags(output)
    if index not in cards.matching(find_calls(output).calls):
        tags[CALL] = cards[index].api_call  # a few published answers call another API
    return ApiPair(question, _answer_of(cards[index], tags), index)


def _of_answer(question: str, response: str, cards: Cards) -> ApiPair | None:
    tags = read_tags(response)
    if tags.get(CALL, response.strip()) == NO_API:
        return ApiPair(question, {DOMAIN: NO_API, CALL: NO_API}, None)
    calls = find_calls(response).calls
    matching = cards.matching(calls)
    if not matching:
        return None
    own = next(call for call in calls if matching[0] in cards.matching([call]))
    return ApiPair(question, _answer_of(cards[matching[0]], {CALL: own.source} | tags), matching[0])


def _answer_of(card: Card, given: dict[str, str]) -> dict[str, str]:
    """Return an answer by tags; what is not given is the card's."""
    framework = str(card.fields.get("framework") or "")
    own = {DOMAIN: card.domain, CALL: card.api_call, PROVIDER: framework}
    return own | {EXPLANATION: str(card.fields["description"])} | given


def to_prompt(question: str, documents: Sequence[str]) -> str:
    """Return a question with the documents of APIs, one on each line.

    >>> to_prompt("写一个标题", ['{"api_name": "title"}'])
    '写一个标题\\n参考以下 API 文档：\\n{"api_name": "title"}'
    """
    heading = HEADINGS["en" if language_of(question) == "en" else "zh"]
    return "\n".join([question, heading, *documents]) if documents else question


def prompt_maker(cards: Cards, top_k: int) -> Callable[[str], str]:
    """Return what gives a question the documents of the top_k cards that BM25 finds, best first."""
    retriever = Retriever(cards)

    def make(question: str) -> str:
        found = retriever.ranked(question, top_k)
        return to_prompt(question, [cards[index].document for index in found])

    return make


def published_prompt(question: str, card: Card | None, retriever: str | None) -> str:
    """Return a prompt with the bytes of Gorilla's question files; card is the one that it shows."""
    if card is None:
        return question
    fields = dict(card.fields)
    document = f" {json.dumps(fields)}}}"
    if retriever == BM25:
        document = f"[Document(page_content={str(fields)!r}, metadata={{}})]"
    return f"{question} \n Use this API documentation for reference: {document}"


def compat_rows(pairs: Sequence[ApiPair], cards: Cards, retriever: str | None) -> list[ContractRow]:
    """Return rows with the published prompts: the right card, or the one that BM25 finds."""
    found = PublishedRetriever(cards) if retriever == BM25 else None
    rows = []
    for number, pair in enumerate(pairs, 1):
        question, index = f" {json.dumps(pair.question)[1:-1]}\\n", pair.card if retriever else None
        if found is not None:
            index = found.ranked(question, 1)[0]
        shown = None if index is None else cards[index]
        prompt = published_prompt(question, shown, retriever)
        rows.append(_to_row(number, pair, prompt, [] if shown is None else [shown]))
    return rows


def training_rows(
    pairs: Sequence[ApiPair], cards: Cards, settings: DocumentSettings
) -> list[ContractRow]:
    """Return rows of the row contract for the pairs."""
    retriever = Retriever(cards) if settings.retriever == BM25 else None
    rows = []
    for number, pair in enumerate([*pairs] * settings.copies, 1):
        rng = Random(f"{settings.seed}:{number}")
        shown = _shown(pair, cards, settings, retriever, rng)
        documents = [cards[index].document for index in shown]
        if pair.card in shown and rng.random() < settings.vary:
            names = identifying_texts(cards[pair.card])
            for name in (name for name in names if name not in pair.question):
                other = _invent(name, rng)
                documents = [document.replace(name, other) for document in documents]
                answer = {tag: text.replace(name, other) for tag, text in pair.answer.items()}
                pair = pair._replace(answer=answer)
        prompt = to_prompt(pair.question, documents)
        rows.append(_to_row(number, pair, prompt, [cards[index] for index in shown]))
    return rows


def _shown(
    pair: ApiPair,
    cards: Cards,
    settings: DocumentSettings,
    retriever: Retriever | None,
    rng: Random,
) -> list[int]:
    """Return the indices of the cards that a prompt shows, in a random order."""
    if settings.retriever is None:
        return []
    order = list(range(len(cards)))
    if retriever is None:
        rng.shuffle(order)
    else:
        order = retriever.ranked(pair.question, len(cards))
    least = 1 if pair.card is None else 0  # where no API fits, that has to be seen in a document
    chosen = [index for index in order if index != pair.card]
    chosen = chosen[: max(settings.distractors, least)]
    if pair.card is not None and rng.random() < settings.p:
        chosen.append(pair.card)
    rng.shuffle(chosen)
    return chosen


def identifying_texts(card: Card) -> list[str]:
    """Return the texts among the identifying arguments that can be told from other words."""
    values = [] if card.call is None else card.call.values
    texts = [one.value for one in values if one.key != one.value and isinstance(one.value, str)]
    own = [text for text in texts if any(repr(text) in key for key in card.identifying)]
    return [text for text in own if len(text) >= MIN_VARIED and re.search("[a-zA-Z]", text)]


def _invent(name: str, rng: Random) -> str:
    """Replace the letters of a name by syllables, and its digits.

    >>> _invent("songmu/Title-2", Random(1))
    'gudifo/Sozoj-1'
    """

    def syllables(run: re.Match[str]) -> str:
        sorts = ("bcdfghjklmnpqrstvwxyz", "aeiou")
        new = "".join(rng.choice(sorts[n % 2]) for n in range(len(run[0])))
        return new.capitalize() if run[0][0].isupper() else new

    name = re.sub("[a-zA-Z]+", syllables, name)
    return re.sub("[0-9]", lambda _: rng.choice("0123456789"), name)


def _to_row(number: int, pair: ApiPair, prompt: str, shown: Sequence[Card]) -> ContractRow:
    return ContractRow(
        id=f"api:{number}",
        prompt=prompt,
        response=write_tags(pair.answer),
        history=[],
        source="api",
        meta={
            "question": pair.question,
            "documents": [card.fields["api_name"] for card in shown],
        },
    )
