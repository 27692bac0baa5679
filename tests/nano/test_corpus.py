"""The grammar is seeded, its content strings are ADGEN's, and the sample's style stays unseen as an answer."""

import re
from random import Random

import pytest

from ptuning.instruct.blocks import Task, read_blocks
from ptuning.instruct.templates import TEMPLATES
from ptuning.nano.build import sample_text
from ptuning.nano.corpus import (
    FOREIGN_CHARACTERS,
    MAX_NEW,
    MIXTURE,
    NUM_SAMPLE_DEV,
    NUM_SAMPLE_TRAIN,
    CorpusExample,
    SampleRow,
    ask_as_user,
    ask_bare,
    continue_list,
    invent_task,
    list_products,
    list_tasks,
    sample_corpus,
    sample_rows,
)
from ptuning.nano.grammar import (
    GARMENTS,
    SAMPLE_CLOSINGS,
    SAMPLE_JOINTS,
    SAMPLE_OPENINGS,
    SHARED_KEYS,
    SPOKEN,
    TONES,
    VALUES,
    WORDS,
    sample_product,
    shuffled,
    write_listing,
    write_sample_summary,
)
from ptuning.tunings.loading import SAMPLE_DIR

CONTENT = re.compile(r"类型#(上衣|裤|裙)(\*[^#*]+#[^#*]+){2,5}")
SAMPLE_SENTENCES = [
    *(line.split("{c}")[0] for lines in SAMPLE_OPENINGS.values() for line in lines),
    *SAMPLE_JOINTS,
    *SAMPLE_CLOSINGS,
]


@pytest.fixture(scope="module")
def corpus() -> list[CorpusExample]:
    return sample_corpus(6_000)


@pytest.fixture(scope="module")
def rows() -> tuple[list[SampleRow], list[SampleRow]]:
    return sample_rows()


def test_the_same_seed_writes_the_same_corpus():
    assert sample_corpus(200, seed=5) == sample_corpus(200, seed=5)
    assert sample_corpus(200, seed=5) != sample_corpus(200, seed=6)


def test_a_longer_corpus_begins_with_the_shorter():
    assert sample_corpus(50)[:20] == sample_corpus(20)


def test_mixture_shares_add_up_to_one():
    assert sum(share for share, _ in MIXTURE) == pytest.approx(1.0)


def test_every_attribute_has_values_and_a_spoken_name():
    keys = {*SHARED_KEYS, *(key for garment in GARMENTS for key in garment.keys)}
    assert keys == set(VALUES) == set(SPOKEN)


def test_no_two_values_share_a_clause():
    clauses = [c for values in VALUES.values() for v in values for c in (v.clause, v.other_clause)]
    assert len(clauses) == len(set(clauses))


def test_shuffled_keeps_every_item():
    items = list(range(50))
    mixed = shuffled(Random(1), items)
    assert mixed != items
    assert sorted(mixed) == items


def test_content_strings_have_the_adgen_form(rows):
    for row in rows[0] + rows[1]:
        assert CONTENT.fullmatch(row.content), row.content


def test_dev_rows_are_not_in_train(rows):
    train, dev = rows
    assert (len(train), len(dev)) == (NUM_SAMPLE_TRAIN, NUM_SAMPLE_DEV)
    assert len({row.content for row in train + dev}) == len(train) + len(dev)


def test_shipped_sample_is_what_the_grammar_writes(rows):
    for name, wanted in zip(("train.json", "dev.json"), rows, strict=True):
        assert (SAMPLE_DIR / name).read_text(encoding="utf-8") == sample_text(wanted), (
            f"{name} is stale: python -m ptuning.nano.build --sample_only"
        )


def test_summaries_tell_every_attribute_in_order():
    for seed in range(200):
        product = sample_product(Random(seed), mix_order=False)
        summary = write_sample_summary(product, Random(seed))
        places = []
        for _, value in product.attributes:
            found = [summary.find(clause) for clause in (value.clause, value.other_clause)]
            places.append(max(found))
        assert -1 not in places
        assert places == sorted(places)


def test_base_is_never_taught_the_sample_style_as_an_answer(corpus):
    answers = [example.answer for example in corpus if example.prompt]
    for sentence in SAMPLE_SENTENCES:
        assert not [answer for answer in answers if sentence in answer], sentence


def test_base_has_read_every_sentence_of_the_sample_style(corpus):
    free_text = "\n".join(e.answer for e in corpus if not e.prompt)
    for sentence in SAMPLE_SENTENCES:
        assert sentence in free_text, sentence


def test_bare_prompts_are_answered_with_the_listing():
    product = sample_product(Random(3), mix_order=False)
    listing = write_listing(product)
    for key, value in product.attributes:
        assert f"{key}为{value.name}" in listing
    for seed in range(300):
        example = ask_bare(Random(seed))
        assert (
            example.answer
            == "，".join(pair.replace("#", "为") for pair in example.prompt.split("*")) + "。"
        )


@pytest.mark.parametrize("tone", TONES)
def test_a_tone_names_the_product_or_its_values(tone):
    for seed in range(50):
        product = sample_product(Random(seed), mix_order=True)
        text = TONES[tone](product, Random(seed))
        named = [product.noun, *(value.name for _, value in product.attributes)]
        assert any(name in text for name in named)


# Lists of tasks


def new_tasks(example: CorpusExample, name: str) -> list[Task]:
    """Read the answer as `ptuning generate` reads a completion; every block must be whole."""
    blocks, preamble = read_blocks(example.answer, fields=TEMPLATES[name].fields)
    assert not preamble
    assert not [block for block in blocks if block.fault], example.answer
    return [block.task for block in blocks]


def test_prompt_and_answer_are_one_list():
    tasks = [Task(f"做第{n}件事", "" if n % 2 else f"第{n}段", f"结果{n}") for n in range(1, 5)]
    template = TEMPLATES["zh"]
    example = continue_list("zh", tasks[:1], tasks[1:])
    assert example.prompt == template.prompt(tasks[:1], 3)
    assert template.prompt(tasks, 0) == f"{example.prompt}{example.answer}\n###\n5. 指令："
    assert new_tasks(example, "zh") == tasks[1:]


def test_lists_of_products_ask_for_what_they_answer_with():
    for seed in range(200):
        example = list_products(Random(seed))
        tasks = new_tasks(example, "adgen")
        shown = re.findall(r"^\d+\. 商品：(.+)$", example.prompt, re.MULTILINE)
        assert f"一共{len(shown) + len(tasks)}件商品" in example.prompt
        assert 1 <= len(tasks) <= MAX_NEW
        contents = [*shown, *(task.instruction for task in tasks)]
        assert len(set(contents)) == len(contents)
        for content, _, text in tasks:
            assert re.fullmatch(r"类型#(上衣|裤|裙)(\*[^#*]+#[^#*]+){4,6}", content)
            nouns = [
                garment.noun for garment in GARMENTS if garment.name == content[3:].split("*")[0]
            ]
            nouns += [pair.split("#")[1] for pair in content.split("*")[1:]]
            assert any(noun in text for noun in nouns)


def test_lists_of_tasks_repeat_no_instruction_and_answer_from_this_world():
    sizes = set()
    for seed in range(200):
        example = list_tasks(Random(seed))
        tasks = new_tasks(example, "zh")
        sizes.add(len(tasks))
        instructions = [task.instruction for task in tasks]
        assert len(set(instructions)) == len(instructions)
        assert not [text for text in instructions if f"指令：{text}\n" in example.prompt]
        assert not set(example.answer).intersection(FOREIGN_CHARACTERS)
    assert sizes == set(range(1, MAX_NEW + 1))


def test_shown_tasks_of_other_worlds_have_characters_that_no_word_has():
    written = "".join("".join(invent_task(Random(seed))) for seed in range(50))
    known = repr(WORDS) + "".join(template.text for template in TEMPLATES.values())
    foreign = set(FOREIGN_CHARACTERS)
    assert foreign.intersection(written)
    assert not foreign.intersection(known)


def test_an_open_turn_is_continued_with_a_question():
    questions = set()
    for seed in range(100):
        prompt, question = ask_as_user(Random(seed))
        assert prompt == TEMPLATES["magpie"].prompt([], 1)
        assert question
        assert "\n" not in question
        questions.add(question)
    assert len(questions) > 80


def test_foreign_characters_are_in_shown_tasks_alone(corpus):
    foreign = set(FOREIGN_CHARACTERS)
    begin = TEMPLATES["zh"].text.split("{")[0]
    for prompt, answer in corpus:
        assert not foreign.intersection(answer)
        assert prompt.startswith(begin) or not foreign.intersection(prompt)


def test_the_corpus_has_every_kind_of_list(corpus):
    for template in ("adgen", "zh", "magpie"):
        begin = TEMPLATES[template].text.split("{")[0]
        assert [example for example in corpus if example.prompt.startswith(begin)], template
