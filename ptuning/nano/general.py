"""General prompts for the nano model: a sample of everything it can do besides the task.

Half are asked or answered in English. They lie in the folder of its weights, where every run finds
them; other ones, for `--mix`, are drawn with another seed.
"""

import json
from collections.abc import Callable, Collection
from random import Random

from ptuning.nano.chat import SMALL_TALK
from ptuning.nano.corpus import ask_value, tell_in_tone
from ptuning.nano.grammar import pick, sample_product

GENERAL_SEED = 20240609
NUM_GENERAL_PROMPTS = 40


def talk_chinese(rng: Random) -> str:
    """Draw Chinese small talk."""
    return pick(rng, [ask for asks, _ in SMALL_TALK for ask in asks if not ask.isascii()])


def talk_english(rng: Random) -> str:
    """Draw English small talk."""
    return pick(rng, [ask for asks, answer in SMALL_TALK if answer.isascii() for ask in asks])


def ask_english(rng: Random) -> str:
    """Ask for a product in English."""
    return f"写成英文：{sample_product(rng, mix_order=False).content}"


def ask_title(rng: Random) -> str:
    """Ask for a title."""
    return f"起一个标题：{sample_product(rng, mix_order=False).content}"


def ask_fact(rng: Random) -> str:
    """Ask for one attribute of a product."""
    product = sample_product(rng, mix_order=False)
    key, _ = pick(rng, product.attributes)
    return f"{product.content}，{key}是什么？"


def ask_tone(rng: Random) -> str:
    """Ask for a text in a tone."""
    product = sample_product(rng, mix_order=False)
    instruction, _ = tell_in_tone(product, rng)
    return f"{instruction}：{product.content}"


def ask_remark(rng: Random) -> str:
    """Ask what is good about a value."""
    return ask_value(rng).prompt


# How many of every 40 prompts are of each sort.
SORTS: tuple[tuple[int, Callable[[Random], str]], ...] = (
    (8, talk_chinese),
    (6, talk_english),
    (14, ask_english),
    (3, ask_title),
    (3, ask_fact),
    (4, ask_tone),
    (2, ask_remark),
)


def sample_general_prompts(
    count: int = NUM_GENERAL_PROMPTS, *, seed: int = GENERAL_SEED, without: Collection[str] = ()
) -> list[str]:
    """Draw different prompts, the sorts in turn by their shares; `without` names ones to avoid.

    ValueError when one sort has not enough of them.
    """
    rng = Random(seed)
    avoided, drawn = set(without), []
    for weight, ask in SORTS:
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
        prompt = ask_tone(rng)
        if prompt not in avoided:
            avoided.add(prompt)
            drawn.append(prompt)
    return drawn


def general_text(prompts: list[str]) -> str:
    """Return the prompts as the text of a file."""
    rows = ",\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    return f"[\n{rows}\n]\n"
