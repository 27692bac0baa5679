"""Invented API documents, and questions that are answered from them.

A prompt is the question, a line that announces documents, and one document a line, as `ptuning api`
writes it. The base answers with what is asked for: the call alone, fields by name, or one sentence.
Names and values are drawn from random syllables, so they cannot be known, only copied; the right
one of several documents shares its topic with the question. `Random.random()` alone is drawn from.
"""

import json
from random import Random
from typing import NamedTuple

from ptuning.apicalls.pairs import HEADINGS
from ptuning.nano.grammar import CHARACTERS, WORDS, pick, shuffled

NONE_FITS = "没有合适的接口。"

WORDS_OF_APIS: dict[str, list[list[str]]] = {
    name: WORDS["apis"][name] for name in ("topics", "verbs", "objects")
}  # Chinese, English
CODE_OF_TOPIC: dict[str, str] = dict(WORDS["apis"]["topics"])
ARGUMENTS: list[str] = WORDS["apis"]["arguments"]
CODE_WORDS: list[str] = WORDS["apis"]["code"]
FIELDS = ("domain", "framework", "functionality", "api_name", "api_call", "description")
ENGLISH_SHARE = 0.08
COPY_SHARE = 0.1
NONE_SHARE = 0.08  # of the prompts with documents
NUM_DOCUMENTS = (0, *[1] * 12, 2, 2, 3, 3)

QUESTIONS = (
    *("帮我{v}{o}的{t}", "我想{v}{t}", "{o}的{t}怎么{v}？", "{t}", "{v}这件{o}的{t}", "{v}一下{t}"),
    *("想知道{o}的{t}", "能不能{v}{t}？", "有个{o}，要{v}{t}", "怎么{v}{o}{t}？", "{v}{o}{t}"),
    *("请给{o}{v}{t}", "{o}{t}", "顾客要{v}{t}，该怎么做？", "这个{o}，{t}呢？"),
)
ENGLISH_QUESTIONS = (
    *("{v} the {t} of a {o}", "I want to {v} the {t}", "how do I {v} a {t}?", "{o} {t}"),
    *("please {v} the {o} {t}", "which API can {v} a {t}?"),
)
DESCRIPTIONS = (
    *("为{o}{v}{t}", "{v}{o}的{t}", "{v}{t}，用于{o}", "{t}：{v}{o}", "给一个{o}，{v}它的{t}"),
)
ENGLISH_DESCRIPTIONS = ("{v} the {t} of a {o}", "{t} of each {o}", "{v} a {t} for the {o}")
TAILS = ("", "", "，返回文字", "，返回数字", "，支持{w}", "，由{w}提供")
# What follows the question, and the answer.
SENTENCES = (
    ("，怎么调用？", "调用：{api_call}"),
    ("，用哪个接口？", "用{api_name}。"),
    ("，属于什么领域？", "属于{domain}。"),
    ("，接口做什么？", "{description}。"),
)


class Topic(NamedTuple):
    """What a question and its document are about: `{t}`, `{v}` and `{o}` of their sentences."""

    t: str
    v: str
    o: str
    is_english: bool


def draw_topic(rng: Random, *, is_english: bool) -> Topic:
    """Draw a topic, three in ten of them two odd characters."""
    topic, verb, noun = (pick(rng, words)[is_english] for words in WORDS_OF_APIS.values())
    if rng.random() < 0.3:
        topic = draw_name(rng) if is_english else pick(rng, CHARACTERS) + pick(rng, CHARACTERS)
    return Topic(topic, verb, noun, is_english)


def draw_name(rng: Random) -> str:
    """Draw a name: a word, syllables (mostly), or any letters."""
    place = rng.random()
    if place < 0.25:
        return pick(rng, CODE_WORDS)
    if place < 0.35:
        return "".join(pick(rng, "abcdefghijklmnopqrstuvwxyz") for _ in range(pick(rng, (2, 3, 4))))
    syllables = (
        pick(rng, "bcdfghjklmnprstwyz") + pick(rng, ("a", "e", "i", "o", "u", "an", "en", "ong"))
        for _ in range(pick(rng, (1, 2, 2, 2, 3)))
    )
    return "".join(syllables)


def draw_repository(rng: Random) -> str:
    """Draw the name of a model, such as `songmu/title-a`."""
    place = rng.random()
    name = draw_name(rng) if place < 0.6 else pick(rng, WORDS_OF_APIS["topics"])[1]
    if rng.random() < 0.7:
        name += "-" + (draw_name(rng) if place < 0.5 else pick(rng, "abcdefgxyz123456789"))
    return f"{draw_name(rng)}/{name}"


def draw_value(rng: Random) -> str:
    """Draw an argument's value as Python writes it."""
    place = rng.random()
    if place < 0.45:
        return f"'{draw_name(rng)}'"
    if place < 0.8:
        return str(int(10 ** (3 * rng.random())))
    return pick(rng, ("True", "False", "0.5", "'zh'", "'en'", "'zh-en'"))


def write_document(topic: Topic, rng: Random) -> dict[str, str | list[str]]:
    """Write an API's document; some lack framework, functionality or api_arguments."""
    words = topic._asdict()
    name = CODE_OF_TOPIC.get(topic.t)
    callee = f"{draw_name(rng)}.{name if name and rng.random() < 0.4 else draw_name(rng)}"
    names = shuffled(rng, ARGUMENTS)[: int(rng.random() * 3)]
    names += [draw_name(rng)] if rng.random() < 0.15 else []
    arguments = {name: draw_value(rng) for name in names}
    if rng.random() < 0.85:
        arguments = {pick(rng, ("repo", "repo", "model")): f"'{draw_repository(rng)}'"} | arguments
    call = f"{callee}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    descriptions = ENGLISH_DESCRIPTIONS if topic.is_english else DESCRIPTIONS
    tail = "" if topic.is_english else pick(rng, TAILS).format(w=draw_name(rng))
    document: dict[str, str | list[str]] = {"domain": topic.t}
    if rng.random() < 0.85:
        document["framework"] = pick(rng, (callee.partition(".")[0], draw_name(rng))).capitalize()
    if rng.random() < 0.85:
        pattern = (
            "{v} {o} {t}" if topic.is_english else pick(rng, ("{v}{o}{t}", "{v}{t}", "{t}{v}"))
        )
        document["functionality"] = pattern.format(**words)
    document |= {"api_name": callee, "api_call": call}
    if rng.random() < 0.15:
        document["api_arguments"] = list(arguments)
    return document | {"description": pick(rng, descriptions).format(**words) + tail}


def write_request(document: dict[str, str | list[str]], rng: Random) -> tuple[str, str]:
    """Return what a question ends with and its answer: mostly nothing, and the call alone."""
    place = rng.random()
    if place < 0.45:
        return "", str(document["api_call"])
    if place < 0.65:
        request, answer = pick(rng, SENTENCES)
        return request, answer.format(**document)
    known = shuffled(rng, [name for name in FIELDS if name in document])
    names = known[: pick(rng, (1, 2, 3, 4))]
    return f"，写出{'、'.join(names)}", "\n".join(f"{name}: {document[name]}" for name in names)


def ask_documents(rng: Random) -> tuple[str, str]:
    """Ask with no, one, two or three documents; return the prompt and its answer.

    Sometimes none of the documents fits. Others hold nothing but a text to copy.
    """
    is_english = rng.random() < ENGLISH_SHARE
    topic = draw_topic(rng, is_english=is_english)
    right = write_document(topic, rng)
    if rng.random() < COPY_SHARE:
        text = pick(rng, (str(right["api_call"]), draw_repository(rng), str(right["description"])))
        return f"照抄：{text}", text
    others: list[dict[str, str | list[str]]] = []
    num_documents = pick(rng, NUM_DOCUMENTS)
    while len(others) < num_documents:
        other = draw_topic(rng, is_english=is_english)
        if other.t != topic.t:
            others.append(write_document(other, rng))
    questions = ENGLISH_QUESTIONS if is_english else QUESTIONS
    request, answer = write_request(right, rng)
    question = pick(rng, questions).format(**topic._asdict()) + request
    if not others:
        return question, NONE_FITS
    if rng.random() < NONE_SHARE:
        answer = NONE_FITS
    else:
        others[0] = right
    lines = [json.dumps(document, ensure_ascii=False) for document in shuffled(rng, others)]
    heading = HEADINGS["en" if is_english else "zh"]
    return "\n".join((question, heading, *lines)), answer
