"""Seeded products and the content strings that describe them, as in `类型#裤*版型#宽松`.

Only `Random.random()` is drawn from, because it is the one method whose numbers Python promises to
keep from version to version: the same seed writes the same text everywhere.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

from ptuning.nano.words import KINDS, SHARED_KEYS, VALUES, Kind, Value

Item = TypeVar("Item")

MIN_ATTRIBUTES = 2  # besides the type
MAX_ATTRIBUTES = 5
FIRST_SHARE = 0.75  # how often the first of several wordings is taken


class Product(NamedTuple):
    """A garment and its attributes, in the order in which they are told."""

    kind: Kind
    attributes: tuple[tuple[str, Value], ...]

    @property
    def content(self) -> str:
        """The product as an ADGEN `content` string."""
        pairs = [("类型", self.kind.name), *((key, value.name) for key, value in self.attributes)]
        return "*".join(f"{key}#{name}" for key, name in pairs)

    @property
    def noun(self) -> str:
        """The most telling name: `阔腿裤` where the shape is known, else `裤子`."""
        shape = self.value_of(self.kind.shape_key)
        return self.kind.noun if shape is None else shape.name

    @property
    def english_noun(self) -> str:
        """The most telling name in English."""
        shape = self.value_of(self.kind.shape_key)
        return self.kind.english if shape is None else shape.english

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


def sample_product(rng: Random, *, mix_order: bool) -> Product:
    """Draw a product; its attributes stay in catalogue order unless `mix_order`."""
    kind = pick(rng, KINDS)
    keys = [*SHARED_KEYS, *kind.keys]
    num_attributes = MIN_ATTRIBUTES + int(rng.random() * (MAX_ATTRIBUTES - MIN_ATTRIBUTES + 1))
    chosen = shuffled(rng, keys)[:num_attributes]
    if not mix_order:
        chosen.sort(key=keys.index)
    return Product(kind, tuple((key, pick(rng, VALUES[key])) for key in chosen))
