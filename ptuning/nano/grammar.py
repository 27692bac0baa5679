"""Seeded products, their content strings (`类型#裤*版型#宽松`), and the styles of their texts.

The base model answers a bare content string with `write_listing` and an instruction with one of
`TONES`. `write_sample_summary` is the style of AdvertiseGen/sample, which the base never answers
with. The words are in words.json, written for this project: garments, attributes with their values
(name, English, two praising clauses), and small talk.

Only `Random.random()` is drawn from: it is the one method whose sequence Python guarantees across
versions, so the same seed writes the same text everywhere.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


class Value(NamedTuple):
    """A value of an attribute, its English word, and two clauses that praise it."""

    name: str
    english: str
    clause: str
    other_clause: str


class Garment(NamedTuple):
    """A kind of garment: its ADGEN type, noun, counter word, English word, and attributes."""

    name: str
    noun: str
    counter: str
    english: str
    shape_key: str
    keys: list[str]


WORDS: dict[str, Any] = json.loads(
    Path(__file__).with_name("words.json").read_text(encoding="utf-8")
)
GARMENTS = [Garment(**garment) for garment in WORDS["garments"]]
SHARED_KEYS: list[str] = WORDS["shared_keys"]  # attributes of every garment
VALUES = {
    key: [Value(*words) for words in attribute["values"]]
    for key, attribute in WORDS["attributes"].items()
}
CHARACTERS = sorted({c for values in VALUES.values() for value in values for c in value.clause})
# What each attribute is called inside a sentence, its English word, and its literary line.
SPOKEN, ENGLISH, LITERARY = (
    {key: attribute[use] for key, attribute in WORDS["attributes"].items()}
    for use in ("spoken", "english", "literary")
)
SAMPLE_OPENINGS, SAMPLE_JOINTS, SAMPLE_CLOSINGS = (
    WORDS["sample"][place] for place in ("openings", "joints", "closings")
)  # {c} is the counter word, {n} the noun

MIN_ATTRIBUTES = 2  # in addition to the type
MAX_ATTRIBUTES = 5
FIRST_SHARE = 0.75  # how often the first of several wordings is taken


class Product(NamedTuple):
    """A garment and its attributes, in the order in which they are told."""

    garment: Garment
    attributes: tuple[tuple[str, Value], ...]

    @property
    def content(self) -> str:
        """The product as an ADGEN `content` string."""
        pairs = [
            ("类型", self.garment.name),
            *((key, value.name) for key, value in self.attributes),
        ]
        return "*".join(f"{key}#{name}" for key, name in pairs)

    def named_values(self) -> list[tuple[str, str]]:
        """Return the type and each attribute with the name of its value."""
        return [("类型", self.garment.name), *((key, value.name) for key, value in self.attributes)]

    @property
    def noun(self) -> str:
        """The most telling name: `阔腿裤` where the shape is known, else `裤子`."""
        shape = self.value_of(self.garment.shape_key)
        return self.garment.noun if shape is None else shape.name

    def value_of(self, key: str) -> Value | None:
        """Return the value of one attribute; None where the product does not say."""
        return dict(self.attributes).get(key)


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """Draw one item, all equally likely."""
    return items[int(rng.random() * len(items))]


def pick_first_mostly(rng: Random, items: Sequence[Item]) -> Item:
    """Draw the first item three times out of four, else one of the others."""
    if len(items) == 1 or rng.random() < FIRST_SHARE:
        return items[0]
    return pick(rng, items[1:])


def shuffled(rng: Random, items: Sequence[Item]) -> list[Item]:
    """Return the items in a random order."""
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def sample_product(
    rng: Random, *, mix_order: bool, fewest: int = MIN_ATTRIBUTES, most: int = MAX_ATTRIBUTES
) -> Product:
    """Draw a product; its attributes stay in catalogue order unless `mix_order`."""
    garment = pick(rng, GARMENTS)
    keys = [*SHARED_KEYS, *garment.keys]
    num_attributes = fewest + int(rng.random() * (most - fewest + 1))
    chosen = shuffled(rng, keys)[:num_attributes]
    if not mix_order:
        chosen.sort(key=keys.index)
    return Product(garment, tuple((key, pick(rng, VALUES[key])) for key in chosen))


def clause_of(rng: Random, value: Value) -> str:
    """Return one of the value's two praising clauses, mostly the first."""
    return pick_first_mostly(rng, (value.clause, value.other_clause))


def write_listing(product: Product) -> str:
    """List the attributes plainly: what the base answers to a bare content string."""
    told = [
        ("类型", product.garment.name),
        *((key, value.name) for key, value in product.attributes),
    ]
    return "，".join(f"{key}为{name}" for key, name in told) + "。"


def write_lively(product: Product, rng: Random) -> str:
    """Write in the lively tone."""
    told = [f"{SPOKEN[key]}选{value.name}" for key, value in product.attributes]
    opening = pick_first_mostly(rng, ("哇，", "嘿，"))
    return f"{opening}好棒的{product.noun}！{'，'.join(told)}，越看越喜欢呀！"


def write_formal(product: Product, rng: Random) -> str:
    """Write in the formal tone."""
    told = [f"{SPOKEN[key]}采用{value.name}" for key, value in product.attributes]
    closing = pick_first_mostly(rng, ("敬请选购。", "欢迎垂询。"))
    return f"本款{product.noun}，{'，'.join(told)}，{closing}"


def write_literary(product: Product, rng: Random) -> str:
    """Write in the literary tone."""
    lines = [LITERARY[key].format(v=value.name) for key, value in product.attributes]
    closing = pick_first_mostly(rng, ("时光很慢，你刚好路过。", "愿你被世界温柔以待。"))
    return "，".join(lines) + "。" + closing


def write_warm(product: Product, rng: Random) -> str:
    """Write in the warm tone, one remark for each attribute."""
    told = [f"{SPOKEN[key]}嘛，{clause_of(rng, value)}" for key, value in product.attributes]
    return f"我跟你说说这{product.garment.counter}{product.noun}。{'；'.join(told)}。"


def write_brief(product: Product, rng: Random) -> str:
    """Write in the brief tone."""
    joint = pick_first_mostly(rng, ("、", "，"))
    return joint.join(value.name for _, value in product.attributes) + f"，{product.noun}。"


TONES: dict[str, Callable[[Product, Random], str]] = {
    "活泼": write_lively,
    "正式": write_formal,
    "文艺": write_literary,
    "亲切": write_warm,
    "简洁": write_brief,
}


def write_title(product: Product) -> str:
    """Write a title: the values in a row, then the name."""
    shape_key = product.garment.shape_key
    return "".join(v.name for key, v in product.attributes if key != shape_key) + product.noun


def write_english(product: Product) -> str:
    """Write one English line."""
    told = [
        f"{WORDS['attributes'][key]['english']}: {value.english}"
        for key, value in product.attributes
        if key != product.garment.shape_key
    ]
    shape = product.value_of(product.garment.shape_key)
    noun = product.garment.english if shape is None else shape.english
    return f"{noun}. {', '.join(told)}."


def write_sample_summary(product: Product, rng: Random) -> str:
    """Write a `summary` of AdvertiseGen/sample: opening, a clause for each attribute, closing."""
    names = {"c": product.garment.counter, "n": product.noun}
    opening = pick_first_mostly(rng, SAMPLE_OPENINGS[product.garment.name]).format(**names)
    clauses = [clause_of(rng, value) for _, value in product.attributes]
    clauses[-1] = pick_first_mostly(rng, SAMPLE_JOINTS) + clauses[-1]
    return f"{opening}{'，'.join(clauses)}。{pick_first_mostly(rng, SAMPLE_CLOSINGS)}"


def write_sample_fragment(product: Product, rng: Random) -> str:
    """Write one sentence of the sample data's kind on its own, so that the base can spell it."""
    names = {"c": product.garment.counter, "n": product.noun}
    place = rng.random()
    if place < 1 / 3:
        return pick(rng, SAMPLE_OPENINGS[product.garment.name]).format(**names)
    if place < 2 / 3:
        _, value = product.attributes[-1]
        return f"{pick(rng, SAMPLE_JOINTS)}{clause_of(rng, value)}。"
    return pick(rng, SAMPLE_CLOSINGS)
