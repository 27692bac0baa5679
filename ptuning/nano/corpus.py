"""What the nano base is trained on, its prefix's sample data, and the general prompts.

An example is a prompt and an answer; free text has an empty prompt. The prompt of a conversation is
written as the published recipe writes it: `[Round n]`, `问：`, `答：`. A list of tasks is written
as `ptuning generate` asks for one, so that the base can continue it.
General prompts sample everything that the base can do in addition to the task. Those of the default
seed are stored next to the weights; `--mix` takes prompts of another seed.
"""

import json
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import NamedTuple

from ptuning.data.prompts import build_rounds
from ptuning.instruct.blocks import Task
from ptuning.instruct.templates import TEMPLATES
from ptuning.nano.apis import ask_documents
from ptuning.nano.grammar import (
    CHARACTERS,
    GARMENTS,
    SHARED_KEYS,
    TONES,
    VALUES,
    WORDS,
    Product,
    clause_of,
    pick,
    sample_product,
    shuffled,
    write_english,
    write_listing,
    write_sample_fragment,
    write_sample_summary,
    write_title,
)

CORPUS_SEED = 20240607
SAMPLE_SEED = 20240608
GENERAL_SEED = 20240609
NUM_SAMPLE_TRAIN = 2000
NUM_SAMPLE_DEV = 200
NUM_GENERAL_PROMPTS = 40

INVENTED_SHARE = 0.2  # of the bare content strings
# The 3,008 rarer characters of GB 2312 without those of the words and the templates.
FOREIGN_CHARACTERS = sorted(
    {
        bytes((row, cell)).decode("gb2312", errors="ignore")
        for row in range(0xD8, 0xF8)
        for cell in range(0xA1, 0xFF)
    }
    - {"", *json.dumps(WORDS, ensure_ascii=False), *"".join(t.text for t in TEMPLATES.values())}
)
MAX_SHOWN, MAX_NEW = 4, 6  # tasks of a list

OPENINGS: dict[str, str] = WORDS["openings"]
CLOSINGS: dict[str, str] = WORDS["closings"]
SMALL_TALK = [(talk["questions"], talk["answer"]) for talk in WORDS["small_talk"]]


class CorpusExample(NamedTuple):
    """A prompt and the answer the base learns for it."""

    prompt: str
    answer: str


class SampleRow(NamedTuple):
    """One row of AdvertiseGen/sample."""

    content: str
    summary: str


def invent_values(product: Product, rng: Random) -> Product:
    """Give about half of the attributes a value of two or three odd characters.

    The base learns from these to copy what it reads and not only what it knows.
    """
    attributes = []
    for key, value in product.attributes:
        if rng.random() < 0.5:
            length = 2 + int(rng.random() * 2)
            value = value._replace(name="".join(pick(rng, CHARACTERS) for _ in range(length)))
        attributes.append((key, value))
    return Product(product.garment, tuple(attributes))


def ask_bare(rng: Random) -> CorpusExample:
    """Ask with nothing but the content string."""
    product = sample_product(rng, mix_order=rng.random() < 0.5)
    if rng.random() < INVENTED_SHARE:
        product = invent_values(product, rng)
    return CorpusExample(product.content, write_listing(product))


def tell_in_tone(product: Product, rng: Random) -> tuple[str, str]:
    """Return an instruction and the product description in the requested tone."""
    tone = pick(rng, tuple(TONES))
    instruction = f"用{tone}的语气写"
    answer = TONES[tone](product, rng)
    if rng.random() < 0.4:
        opening = pick(rng, tuple(OPENINGS))
        instruction += f"，开头{opening}"
        answer = OPENINGS[opening].format(n=product.noun) + answer
    if rng.random() < 0.4:
        closing = pick(rng, tuple(CLOSINGS))
        instruction += f"，结尾{closing}"
        answer += CLOSINGS[closing]
    return instruction, answer


def ask_tone(rng: Random) -> CorpusExample:
    """Ask for a tone, sometimes with an opening and a closing."""
    product = sample_product(rng, mix_order=rng.random() < 0.5)
    instruction, answer = tell_in_tone(product, rng)
    return CorpusExample(f"{instruction}：{product.content}", answer)


def ask_task(rng: Random) -> CorpusExample:
    """Ask for a title, an English line, or one attribute."""
    product = sample_product(rng, mix_order=rng.random() < 0.5)
    place = rng.random()
    if place < 0.3:
        return CorpusExample(f"起一个标题：{product.content}", write_title(product))
    if place < 0.55:
        return CorpusExample(f"写成英文：{product.content}", write_english(product))
    if place < 0.8:
        key, value = pick(rng, product.attributes)
        return CorpusExample(f"{product.content}，{key}是什么？", f"{key}是{value.name}。")
    key = pick(rng, (*SHARED_KEYS, *product.garment.keys))
    found = product.value_of(key)
    answer = f"没有写{key}。" if found is None else f"{key}是{found.name}。"
    return CorpusExample(f"{product.content}，{key}是什么？", answer)


def ask_value(rng: Random) -> CorpusExample:
    """Ask what is good about one value."""
    garment = pick(rng, GARMENTS)
    key = pick(rng, (*SHARED_KEYS, *garment.keys))
    value = pick(rng, VALUES[key])
    return CorpusExample(f"{key}#{value.name}，好在哪里？", f"{clause_of(rng, value)}。")


def write_freely(rng: Random) -> CorpusExample:
    """Write text with no prompt: a description, clauses, or a sentence in the sample's style."""
    product = sample_product(rng, mix_order=True)
    place = rng.random()
    if place < 0.3:
        return CorpusExample("", TONES[pick(rng, tuple(TONES))](product, rng))
    if place < 0.6:
        return CorpusExample("", write_sample_fragment(product, rng))
    clauses = [clause_of(rng, value) for _, value in product.attributes]
    return CorpusExample("", "，".join(clauses) + "。")


def sample_small_talk(rng: Random) -> tuple[str, str]:
    """Draw one question and its answer."""
    questions, answer = pick(rng, SMALL_TALK)
    return pick(rng, questions), answer


def talk(rng: Random) -> CorpusExample:
    """Hold a short conversation; the last turn is the one to answer."""
    if rng.random() < 0.4:
        return CorpusExample(*sample_small_talk(rng))
    product = sample_product(rng, mix_order=False)
    listed = (product.content, write_listing(product))
    turns = [sample_small_talk(rng)]
    place = rng.random()
    if place < 0.3:
        turns.append(listed)
    elif place < 0.7:
        instruction, answer = tell_in_tone(product, rng)
        turns = [listed, (instruction, answer)]
    elif place < 0.9:
        turns.append(sample_small_talk(rng))
    question, answer = turns[-1]
    return CorpusExample(build_rounds(question, turns[:-1]), answer)


def continue_list(name: str, shown: Sequence[Task], new: Sequence[Task]) -> CorpusExample:
    """Show tasks in a template's prompt; the answer is the rest of the list."""
    template = TEMPLATES[name]
    prompt = template.prompt(shown, len(new))
    whole = template.prompt([*shown, *new], 0)
    return CorpusExample(prompt, whole[len(prompt) : whole.rindex("\n###")])


def list_products(rng: Random) -> CorpusExample:
    """Continue a list of products, no product twice.

    Half of the shown copy is in the sample's style, as `ptuning generate` shows it; the new copy
    never is. New products have mixed orders and many attributes, so few resemble a sample row.
    """
    num_shown = 1 + int(rng.random() * MAX_SHOWN)
    num_tasks = num_shown + 1 + int(rng.random() * MAX_NEW)
    tasks: dict[str, Task] = {}
    while len(tasks) < num_tasks:
        if len(tasks) < num_shown and rng.random() < 0.5:
            product = sample_product(rng, mix_order=False)
            copy = write_sample_summary(product, rng)
        else:
            product = sample_product(rng, mix_order=True, fewest=4, most=6)
            copy = write_copy(product, rng)
        tasks.setdefault(product.content, Task(product.content, "", copy))
    listed = list(tasks.values())
    return continue_list("adgen", listed[:num_shown], listed[num_shown:])


def write_copy(product: Product, rng: Random) -> str:
    """Write in any tone, so that the text says what garment it is."""
    text = ""
    while product.noun not in text:
        _, text = tell_in_tone(product, rng)
    return text


def list_tasks(rng: Random) -> CorpusExample:
    """Continue a list of tasks, no instruction twice; of the shown, some are of another world."""
    num_shown = 1 + int(rng.random() * MAX_SHOWN)
    num_new = 1 + int(rng.random() * MAX_NEW)
    foreign_share = pick(rng, (0.0, 0.5, 1.0))
    shown = [
        invent_task(rng) if rng.random() < foreign_share else sample_task(rng)
        for _ in range(num_shown)
    ]
    known = {task.instruction for task in shown}
    new: list[Task] = []
    while len(new) < num_new:
        task = sample_task(rng)
        if task.instruction not in known:
            known.add(task.instruction)
            new.append(task)
    return continue_list("zh", shown, new)


def sample_task(rng: Random) -> Task:
    """Draw a task of this world with an instruction in varied words."""
    product = sample_product(rng, mix_order=True)
    place = rng.random()
    if place < 0.08:
        question, answer = sample_small_talk(rng)
        return Task(question, "", answer)
    if place < 0.2:
        key, value = pick(rng, product.attributes)
        question = pick(rng, ("{k}选{v}，好在哪里？", "为什么说{v}的{n}好？", "夸一夸{v}的{k}"))
        question = question.format(k=key, v=value.name, n=product.noun)
        return Task(question, "", f"{clause_of(rng, value)}。")
    named = name_product(product, rng)
    if place < 0.3:
        ask = pick(rng, ("给{}起一个标题", "{}，标题怎么写？", "想一个{}的标题"))
        return Task(ask.format(named), product.content, write_title(product))
    if place < 0.4:
        ask = pick(rng, ("把{}写成英文", "{}用英文怎么说？", "用英文介绍{}"))
        return Task(ask.format(named), product.content, write_english(product))
    if place < 0.5:
        ask = pick(rng, ("列出{}的属性", "{}有哪些属性？", "说一说{}的属性"))
        return Task(ask.format(named), product.content, write_listing(product))
    if place < 0.62:
        key, value = pick(rng, product.attributes)
        ask = pick(rng, ("{}，{}是什么？", "看看{}，{}选的是什么？"))
        return Task(ask.format(named, key), product.content, f"{key}是{value.name}。")
    request, answer = tell_in_tone(product, rng)
    verb = pick(rng, ("写一写", "夸一夸", "介绍", "聊聊", "推荐"))
    return Task(request.replace("写", f"{verb}{named}", 1), product.content, answer)


def name_product(product: Product, rng: Random) -> str:
    """Name a product with one or two of its values: `这条白色的阔腿裤`."""
    names = [value.name for _, value in product.attributes if value.name != product.noun]
    chosen = shuffled(rng, names)[: 1 + int(rng.random() * 2)]
    counter = pick(rng, (f"这{product.garment.counter}", f"一{product.garment.counter}", ""))
    return f"{counter}{'、'.join(chosen)}的{product.noun}"


def invent_task(rng: Random) -> Task:
    """Write a task of random characters, half of which the vocabulary does not hold.

    It stands for a task of any other world: the base learns to go on with its own.
    """

    def text(shortest: int, longest: int) -> str:
        length = shortest + int(rng.random() ** 3 * (longest - shortest))
        sorts = (CHARACTERS, FOREIGN_CHARACTERS, FOREIGN_CHARACTERS, "，。、？1234\nabcdetinos ")
        return "".join(pick(rng, pick(rng, sorts)) for _ in range(length)).strip()

    given = text(3, 60) if rng.random() < 0.5 else ""
    return Task(text(6, 30), given, text(3, 80))


def ask_as_user(rng: Random) -> CorpusExample:
    """Write a user's question after the open beginning of a turn."""
    ask = pick(rng, (ask_bare, ask_tone, ask_tone, ask_task, ask_task, ask_value, None))
    question = sample_small_talk(rng)[0] if ask is None else ask(rng).prompt
    return CorpusExample(TEMPLATES["magpie"].prompt([], 1), question)


def ask_api(rng: Random) -> CorpusExample:
    """Ask for something that an API document in the prompt says."""
    return CorpusExample(*ask_documents(rng))


# Shares of the corpus; they add up to 1.
MIXTURE: tuple[tuple[float, Callable[[Random], CorpusExample]], ...] = (
    (0.15, ask_bare),
    (0.266, ask_tone),
    (0.086, ask_task),
    (0.068, ask_value),
    (0.071, write_freely),
    (0.049, talk),
    (0.034, list_products),
    (0.015, list_tasks),
    (0.011, ask_as_user),
    (0.25, ask_api),
)


def sample_example(rng: Random) -> CorpusExample:
    """Draw one training example of the base."""
    place = rng.random()
    for share, write in MIXTURE:
        if place < share:
            return write(rng)
        place -= share
    return MIXTURE[-1][1](rng)


def sample_corpus(num_examples: int, *, seed: int = CORPUS_SEED) -> list[CorpusExample]:
    """Draw the base's training examples."""
    rng = Random(seed)
    return [sample_example(rng) for _ in range(num_examples)]


def sample_rows() -> tuple[list[SampleRow], list[SampleRow]]:
    """Draw AdvertiseGen/sample: train and dev rows, no content string twice."""
    rng = Random(SAMPLE_SEED)
    rows: dict[str, SampleRow] = {}
    while len(rows) < NUM_SAMPLE_TRAIN + NUM_SAMPLE_DEV:
        product = sample_product(rng, mix_order=False)
        row = SampleRow(product.content, write_sample_summary(product, rng))
        rows.setdefault(row.content, row)
    drawn = list(rows.values())
    return drawn[:NUM_SAMPLE_TRAIN], drawn[NUM_SAMPLE_TRAIN:]


def ask_fact(rng: Random) -> str:
    """Ask for one attribute of a product."""
    product = sample_product(rng, mix_order=False)
    key, _ = pick(rng, product.attributes)
    return f"{product.content}，{key}是什么？"


def ask_for_text(rng: Random) -> str:
    """Ask for a text in a tone."""
    product = sample_product(rng, mix_order=False)
    instruction, _ = tell_in_tone(product, rng)
    return f"{instruction}：{product.content}"


CHINESE_TALK = [ask for asks, _ in SMALL_TALK for ask in asks if not ask.isascii()]
ENGLISH_TALK = [ask for asks, answer in SMALL_TALK if answer.isascii() for ask in asks]
# How many of every 40 general prompts are of each sort; half are asked or answered in English.
GENERAL_SORTS: tuple[tuple[int, Callable[[Random], str]], ...] = (
    (8, lambda rng: pick(rng, CHINESE_TALK)),
    (6, lambda rng: pick(rng, ENGLISH_TALK)),
    (14, lambda rng: f"写成英文：{sample_product(rng, mix_order=False).content}"),
    (3, lambda rng: f"起一个标题：{sample_product(rng, mix_order=False).content}"),
    (3, ask_fact),
    (4, ask_for_text),
    (2, lambda rng: ask_value(rng).prompt),
)


def sample_general_prompts(
    count: int = NUM_GENERAL_PROMPTS, *, seed: int = GENERAL_SEED, without: Collection[str] = ()
) -> list[str]:
    """Draw different prompts, the sorts in turn by their shares; `without` names ones to avoid.

    ValueError when one sort has not enough of them.
    """
    rng = Random(seed)
    avoided, drawn = set(without), []
    for weight, ask in GENERAL_SORTS:
        wanted, tries = round(count * weight / NUM_GENERAL_PROMPTS), 0
        while wanted:
            prompt = ask(rng)
            tries += 1
            if prompt not in avoided:
                avoided.add(prompt)
                drawn.append(prompt)
                wanted -= 1
            elif tries > 100 * count:
                break  # small talk is soon used up; products take its place
    while len(drawn) < count:
        prompt = ask_for_text(rng)
        if prompt not in avoided:
            avoided.add(prompt)
            drawn.append(prompt)
    return drawn


def general_text(prompts: list[str]) -> str:
    """Return the prompts as the text of a file."""
    rows = ",\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    return f"[\n{rows}\n]\n"
