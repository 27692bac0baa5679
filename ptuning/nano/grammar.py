"""Seeded products, their content strings (`类型#裤*版型#宽松`), and the styles they are told in.

The base model answers a bare content string with `write_listing` and an instruction with one of
`TONES`. `write_sample_summary` is the style of AdvertiseGen/sample: the base never answers with it.
Only `Random.random()` is drawn from, because it is the one method whose numbers Python promises to
keep from version to version: the same seed writes the same text everywhere.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from ptuning.nano.words import KINDS, SHARED_KEYS, SPOKEN_KEYS, VALUES, Kind, Value

Item = TypeVar("Item")

MIN_ATTRIBUTES = 2  # in addition to the type
MAX_ATTRIBUTES = 5
FIRST_SHARE = 0.75  # how often the first of several wordings is taken

LITERARY_LINES = {
    "版型": "{v}的轮廓里住着一阵风",
    "材质": "{v}贴着皮肤轻声说话",
    "颜色": "一抹{v}落在黄昏的窗边",
    "风格": "{v}的心事慢慢展开",
    "图案": "{v}在布上悄悄生长",
    "衣样式": "{v}替岁月挡住寒凉",
    "衣领型": "{v}托起一张安静的脸",
    "衣袖型": "{v}挽住了流动的光",
    "衣款式": "{v}收藏着旧日的信",
    "裤长": "{v}丈量着远方的路",
    "裤型": "{v}走过落叶的长街",
    "裤腰型": "{v}系住一整个秋天",
    "裤口": "{v}沾着清晨的露水",
    "裙型": "{v}摇曳成一首小诗",
    "裙下摆": "{v}拂过沉睡的青草",
    "裙长": "{v}拖着月色回家",
    "裙腰型": "{v}是温柔的一笔",
}

# The sample data's openings by kind, joints and closings. {c} counts, {n} names.
SAMPLE_OPENINGS = {
    "上衣": ("姐妹们快看这{c}{n}！", "衣柜里就缺这{c}{n}！"),
    "裤": ("今天必须夸夸这{c}{n}！", "挖到宝啦，就是这{c}{n}！"),
    "裙": ("谁能拒绝这{c}{n}呢！", "第一眼就爱上这{c}{n}！"),
}
SAMPLE_JOINTS = ("重点是", "最妙的是")
SAMPLE_CLOSINGS = ("闭眼入准没错！", "早买早享受！", "穿上它就出发吧！")


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


def clause_of(rng: Random, value: Value) -> str:
    """Return one of the value's two praising clauses, mostly the first."""
    return pick_first_mostly(rng, (value.clause, value.other_clause))


def write_listing(product: Product) -> str:
    """List the attributes plainly: what the base answers to a bare content string."""
    told = [("类型", product.kind.name), *((key, value.name) for key, value in product.attributes)]
    return "，".join(f"{key}为{name}" for key, name in told) + "。"


def write_lively(product: Product, rng: Random) -> str:
    """Write in the lively tone."""
    told = [f"{SPOKEN_KEYS[key][0]}选{value.name}" for key, value in product.attributes]
    opening = pick_first_mostly(rng, ("哇，", "嘿，"))
    return f"{opening}好棒的{product.noun}！{'，'.join(told)}，越看越喜欢呀！"


def write_formal(product: Product, rng: Random) -> str:
    """Write in the formal tone."""
    told = [f"{SPOKEN_KEYS[key][0]}采用{value.name}" for key, value in product.attributes]
    closing = pick_first_mostly(rng, ("敬请选购。", "欢迎垂询。"))
    return f"本款{product.noun}，{'，'.join(told)}，{closing}"


def write_literary(product: Product, rng: Random) -> str:
    """Write in the literary tone."""
    lines = [LITERARY_LINES[key].format(v=value.name) for key, value in product.attributes]
    closing = pick_first_mostly(rng, ("时光很慢，你刚好路过。", "愿你被世界温柔以待。"))
    return "，".join(lines) + "。" + closing


def write_warm(product: Product, rng: Random) -> str:
    """Write in the warm tone, one remark for each attribute."""
    told = [
        f"{SPOKEN_KEYS[key][0]}嘛，{clause_of(rng, value)}" for key, value in product.attributes
    ]
    return f"我跟你说说这{product.kind.counter}{product.noun}。{'；'.join(told)}。"


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
    shape_key = product.kind.shape_key
    return "".join(v.name for key, v in product.attributes if key != shape_key) + product.noun


def write_english(product: Product) -> str:
    """Write one English line."""
    told = [
        f"{SPOKEN_KEYS[key][1]}: {value.english}"
        for key, value in product.attributes
        if key != product.kind.shape_key
    ]
    shape = product.value_of(product.kind.shape_key)
    noun = product.kind.english if shape is None else shape.english
    return f"{noun}. {', '.join(told)}."


def write_sample_summary(product: Product, rng: Random) -> str:
    """Write a `summary` of AdvertiseGen/sample: opening, a clause for each attribute, closing."""
    names = {"c": product.kind.counter, "n": product.noun}
    opening = pick_first_mostly(rng, SAMPLE_OPENINGS[product.kind.name]).format(**names)
    clauses = [clause_of(rng, value) for _, value in product.attributes]
    clauses[-1] = pick_first_mostly(rng, SAMPLE_JOINTS) + clauses[-1]
    return f"{opening}{'，'.join(clauses)}。{pick_first_mostly(rng, SAMPLE_CLOSINGS)}"


def write_sample_fragment(product: Product, rng: Random) -> str:
    """Write one sentence of the sample data's kind on its own, so that the base can spell it."""
    names = {"c": product.kind.counter, "n": product.noun}
    place = rng.random()
    if place < 1 / 3:
        return pick(rng, SAMPLE_OPENINGS[product.kind.name]).format(**names)
    if place < 2 / 3:
        _, value = product.attributes[-1]
        return f"{pick(rng, SAMPLE_JOINTS)}{clause_of(rng, value)}。"
    return pick(rng, SAMPLE_CLOSINGS)
