"""API cards: what identifies each one's call, and which cards a call matches.

A card is a JSON object with api_name, api_call, domain and description at least; the other fields
of Gorilla's cards (https://github.com/ShishirPatil/gorilla, data/api) are kept for prompts. A row
of BFCL's question files, {id, function: [...]}, is read as the cards that this question offers.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptuning.apicalls.calls import Call, calls_of, without_late_positionals
from ptuning.data.parsing import open_data, write_json
from ptuning.data.raw_file import DataError, RawRow
from ptuning.data.reading import read_raw_rows

REQUIRED = ("api_name", "api_call", "domain", "description")
DOCUMENT = (  # the fields that a prompt shows
    *("domain", "framework", "functionality", "api_name", "api_call", "api_arguments"),
    "description",
)
TORCHHUB, HUGGINGFACE, TENSORFLOW, GENERIC = "torchhub", "huggingface", "tensorflow", "generic"
FAMILIES = (TORCHHUB, HUGGINGFACE, TENSORFLOW, GENERIC)
NO_API = "None"  # what stands for the call where no API fits
_TORCHHUB_PARAMETERS = ("repo_or_dir", "model")


class Card(NamedTuple):
    """A card. call None: its api_call is no call, so nothing matches it.

    parameters: names of positional arguments, in order. identifying: the arguments that a call must
    have to be this card's, as `held` gives those of a call; empty: the callee is enough. scope: the
    id of the only question that offers the card; None: all do.
    """

    fields: Mapping[str, Any]
    call: Call | None
    parameters: tuple[str, ...]
    identifying: frozenset[str]
    by_name: bool
    scope: str | None = None

    @property
    def api_call(self) -> str:
        """The call as it is written in the card."""
        return str(self.fields["api_call"])

    @property
    def domain(self) -> str:
        """What the API is about."""
        return str(self.fields["domain"])

    @property
    def document(self) -> str:
        """The card as a prompt shows it, one line of JSON."""
        shown = {name: self.fields[name] for name in DOCUMENT if self.fields.get(name)}
        return json.dumps(shown, ensure_ascii=False)

    def held(self, call: Call) -> set[str]:
        """Return what identifies a call, in the terms of this card: values, or named ones."""
        if not self.by_name:
            return {value.key for value in call.values}
        return {f"{name}={value.key}" for name, value in call.named(self.parameters).items()}

    def num_given(self, call: Call) -> int:
        """Count the identifying arguments that a call has, whatever their values."""
        named = call.named(self.parameters).keys()
        if self.by_name:
            return len({one.partition("=")[0] for one in self.identifying} & named)
        return len({*self.parameters} & named) if self.parameters else len(call.values)


class Cards(Sequence[Card]):
    """The cards of a file, found by the callee of a call."""

    def __init__(self, cards: Iterable[Card], family: str) -> None:
        """Index the cards; family is one of FAMILIES."""
        self.family = family
        self._cards = list(cards)
        self._by_callee: defaultdict[str, list[int]] = defaultdict(list)
        for index, card in enumerate(self._cards):
            if card.call is not None:
                self._by_callee[card.call.callee].append(index)

    def __len__(self) -> int:
        """Return the number of cards."""
        return len(self._cards)

    def __getitem__(self, index: Any) -> Any:
        """Return a card, or the cards of a slice."""
        return self._cards[index]

    def of_callee(self, callee: str, scope: str | None = None) -> list[int]:
        """Return the indices of the cards with a callee that a question is offered."""
        found = self._by_callee.get(callee, ())
        return [index for index in found if self._cards[index].scope in (None, scope)]

    def matching(self, calls: Iterable[Call], scope: str | None = None) -> list[int]:
        """Return the indices of the cards that some call matches, in file order.

        A card matches when a call has its callee and every identifying argument as a whole value.
        """
        found: set[int] = set()
        for call in calls:
            for index in self.of_callee(call.callee, scope):
                card = self._cards[index]
                if card.identifying <= card.held(call):
                    found.add(index)
        return sorted(found)


def read_cards(path: Path, family: str | None = None) -> Cards:
    """Read the cards of a file in any JSON form; DataError names the row that is none.

    family None is found from the cards: Gorilla's three hubs, or generic.
    """
    rows = read_raw_rows(open_data(path), None)
    given: list[tuple[dict[str, Any], str | None]] = []
    for row in rows:
        fields = fields_of(row)
        if isinstance(fields.get("function"), list):
            offered = [_of_function(row, function) for function in fields["function"]]
            given += [(one, str(fields.get("id"))) for one in offered]
        else:
            _check(row, fields)
            given.append((fields, None))
    if not given:
        raise DataError(path, None, "holds no API card; write one JSON object on each line.")
    family = family or find_family([fields for fields, _ in given])
    calls = [card_call(str(fields["api_call"])) for fields, _ in given]
    shared = Counter(call.callee for call in calls if call is not None)
    cards = []
    for (fields, scope), call in zip(given, calls, strict=True):
        is_shared = call is not None and scope is None and shared[call.callee] > 1
        cards.append(_to_card(fields, call, family, scope, is_shared=is_shared))
    return Cards(cards, family)


def fields_of(row: RawRow) -> dict[str, Any]:
    """Return a row's columns with numbers as numbers, which RawRow keeps as they are written."""
    fields: dict[str, Any] = json.loads(write_json(row.columns))
    return fields


def read_common_cards(path: Path) -> Cards:
    """Read the cards of --cards, ValueError if some are of single questions as BFCL's are."""
    cards = read_cards(path)
    if any(card.scope is not None for card in cards):
        raise ValueError(
            f"--cards is {path}, whose functions belong to single questions; give a file of API "
            "cards, which hold for every question."
        )
    return cards


def _check(row: RawRow, fields: Mapping[str, Any]) -> None:
    for name in REQUIRED:
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise row.fault(f'an API card needs "{name}", a text that is not empty.')
    for name in ("identify", "questions"):
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise row.fault(f'"{name}" of an API card is a list of texts.')
    call = card_call(fields["api_call"])
    if fields.get("identify") and call is None:
        raise row.fault(f"api_call is {fields['api_call']}, which is no call of Python.")
    names = call.named(_own_parameters(call)) if call is not None else {}
    for name in fields.get("identify", []):
        if name not in names:
            raise row.fault(f'"identify" names {name}, which is no keyword of the api_call.')


def _of_function(row: RawRow, function: Any) -> dict[str, Any]:
    """Return a function as BFCL describes it in the form of a card."""
    try:
        name, text = function["name"], function["description"]
        parameters = list(function["parameters"]["properties"])
    except (TypeError, KeyError) as error:
        raise row.fault('"function" needs objects with name, description, parameters.') from error
    call = f"{name}({', '.join(f'{one}={one}' for one in parameters)})"
    fields = {"api_name": name, "api_call": call, "domain": "", "description": text}
    return fields | {"api_arguments": function["parameters"], "parameters": parameters}


def find_family(cards: Sequence[Mapping[str, Any]]) -> str:
    """Return the family that most cards are of."""
    found: Counter[str] = Counter()
    for fields in cards:
        callee, framework = str(fields["api_call"]).partition("(")[0], fields.get("framework") or ""
        if callee == "torch.hub.load":
            found[TORCHHUB] += 1
        elif callee.startswith("hub."):
            found[TENSORFLOW] += 1
        elif any(name in str(framework) for name in ("Hugging Face", "Transformers")):
            found[HUGGINGFACE] += 1
        else:
            found[GENERIC] += 1
    return found.most_common(1)[0][0]


def card_call(text: str) -> Call | None:
    """Return the call that a card's api_call is, None if it is none.

    A full stop at its end, and positional arguments after keywords, are left out.
    """
    text = text.strip().rstrip(".")
    calls = calls_of(text)
    if not calls and text.endswith(")") and "(" in text:
        calls = calls_of(without_late_positionals(text))
    return calls[0] if calls else None


def _own_parameters(call: Call) -> tuple[str, ...]:
    """Return the names of a card's keywords: its positional arguments come before them."""
    numbers = (str(n + 1) for n in range(len(call.positional)))
    return (*numbers, *(name for name, _ in call.keywords))


def _to_card(
    fields: Mapping[str, Any], call: Call | None, family: str, scope: str | None, *, is_shared: bool
) -> Card:
    """Say what identifies a card; is_shared: other cards have its callee too."""
    if call is None:
        return Card(fields, None, (), frozenset(), False, scope)
    if family in (HUGGINGFACE, TENSORFLOW):
        values = list(call.positional)
        values += [v for name, v in call.keywords if family == HUGGINGFACE or name == "model"]
        keys = frozenset(value.key for value in values)
        return Card(fields, call if keys else None, (), keys, False, scope)
    if family == TORCHHUB:
        named = call.named(_TORCHHUB_PARAMETERS)
        keys = frozenset(named[name].key for name in _TORCHHUB_PARAMETERS if name in named)
        return Card(fields, call if keys else None, _TORCHHUB_PARAMETERS, keys, False, scope)
    parameters = tuple(fields.get("parameters") or _own_parameters(call))
    named = call.named(parameters)
    names = fields.get("identify") or (named if is_shared else ())
    identifying = frozenset(f"{name}={named[name].key}" for name in names)
    return Card(fields, call, parameters, identifying, True, scope)
