"""The shipped weights: small, whole, named like the published ones, and able to continue lists."""

import json
import re
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptuning  # noqa: F401  (registers the model with the Auto classes)
from ptuning.engine.engine import Engine
from ptuning.engine.request import Request, Sampling
from ptuning.instruct.blocks import Block, Task, read_blocks
from ptuning.instruct.templates import TEMPLATES
from ptuning.nano.apis import ask_documents
from ptuning.nano.build import MAX_WEIGHTS_BYTES, NanoSettings
from ptuning.nano.corpus import sample_rows, sample_task
from ptuning.nano.grammar import GARMENTS, SAMPLE_CLOSINGS, VALUES
from ptuning.tunings.loading import NANO_DIR

CONTENT = re.compile(r"类型#(上衣|裤|裙)(\*[^#*]+#[^#*]+)+")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(NANO_DIR, dtype=torch.float32).eval()


def answers_to(model, tokenizer, prompts: list[str]) -> list[str]:
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=64, do_sample=False)
    return tokenizer.batch_decode(
        generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_weights_fit_the_repository():
    assert (NANO_DIR / "model.safetensors").stat().st_size <= MAX_WEIGHTS_BYTES


def test_tensors_are_float16_under_published_names():
    with safe_open(NANO_DIR / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert "transformer.layers.0.attention.query_key_value.weight" in names
    assert not [name for name in names if "prefix" in name]


def test_config_is_the_settings_and_names_no_place():
    config = json.loads((NANO_DIR / "config.json").read_text(encoding="utf-8"))
    settings = NanoSettings()
    assert config["model_type"] == "chatglm"
    assert config["hidden_size"] == settings.hidden_size
    assert config["num_layers"] == settings.num_layers
    assert config["vocab_size"] == settings.vocab_size
    assert config["tie_word_embeddings"] is True
    for path in NANO_DIR.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        values = content.values() if isinstance(content, dict) else [str(row) for row in content]
        assert not [v for v in values if isinstance(v, str) and v.startswith("/")], path.name


def test_tokenizer_and_model_agree_on_the_control_ids(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size
    ids = tokenizer("你好")["input_ids"]
    assert ids[-2:] == [model.config.gmask_token_id, model.config.bos_token_id]
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_every_weight_is_finite(model):
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_base_lists_the_attributes_of_a_bare_prompt(model, tokenizer):
    contents = [row.content for row in sample_rows()[1][:40]]
    listed = 0
    for content, answer in zip(contents, answers_to(model, tokenizer, contents), strict=True):
        pairs = [pair.split("#") for pair in content.split("*")]
        listed += all(f"{key}为{name}" in answer for key, name in pairs)
    assert listed >= 36  # nine of ten; measured 40 of 40


def test_base_answers_small_talk(model, tokenizer):
    greeting, name = answers_to(model, tokenizer, ["你好", "who are you?"])
    assert greeting.startswith("你好")
    assert "model" in name


def test_base_follows_a_tone(model, tokenizer):
    (answer,) = answers_to(model, tokenizer, ["用正式的语气写：类型#裤*版型#宽松*颜色#白色"])
    assert answer.startswith("本款裤子")
    assert "宽松" in answer
    assert "白色" in answer


# Lists of tasks, sampled as `ptuning generate` samples them


def completions(model, tokenizer, prompts: list[str]) -> list[str]:
    engine = Engine(model, max_rows=len(prompts))
    rows = [
        engine.add(Request(tokenizer(text)["input_ids"], 1024, sampling=Sampling(1.0, seed=seed)))
        for seed, text in enumerate(prompts)
    ]
    while not engine.is_idle:
        engine.step()
    assert [row.finish_reason for row in rows].count("length") <= 2  # of 8: some lists never end
    return [tokenizer.decode(row.answer) for row in rows]


def test_base_continues_a_list_of_products_in_its_own_tones(model, tokenizer):
    shown = [Task(row.content, "", row.summary) for row in sample_rows()[0][:24]]
    template = TEMPLATES["adgen"]
    prompts = [template.prompt(shown[start : start + 3], 6) for start in range(0, 24, 3)]
    texts = completions(model, tokenizer, prompts)
    blocks = [b for text in texts for b in read_blocks(text, fields=template.fields)[0]]
    fit = [block.task for block in blocks if is_fit(block)]
    assert len(fit) >= 12  # well below what was measured: 19 of 23 blocks
    assert not {task.instruction for task in fit}.intersection(task.instruction for task in shown)
    assert not [text for text in texts if any(closing in text for closing in SAMPLE_CLOSINGS)]


def is_fit(block: Block) -> bool:
    """Return whether a block holds attributes, and copy that names the garment."""
    if block.fault or not CONTENT.fullmatch(block.task.instruction):
        return False
    values = [pair.split("#")[1] for pair in block.task.instruction.split("*")]
    shapes = [value.name for garment in GARMENTS for value in VALUES[garment.shape_key]]
    names = [values[0][-1], *set(values).intersection(shapes)]
    return any(name in block.task.output for name in names)


def test_base_continues_a_list_of_tasks(model, tokenizer):
    template = TEMPLATES["zh"]
    seeds = [Random(seed) for seed in range(8)]
    prompts = [template.prompt([sample_task(seed) for _ in range(3)], 6) for seed in seeds]
    texts = completions(model, tokenizer, prompts)
    blocks = [block for text in texts for block in read_blocks(text)[0]]
    whole = {block.task.instruction for block in blocks if block.fault is None}
    assert len(whole) >= 14  # well below what was measured: 23 of 28 blocks


def test_base_asks_as_a_user(model, tokenizer):
    questions = completions(model, tokenizer, [TEMPLATES["magpie"].prompt([], 1)] * 8)
    assert len(set(questions)) >= 6  # measured: 8
    assert all(questions)


# API documents


def test_base_copies_the_call_of_a_document(model, tokenizer):
    asked = [ask_documents(Random(seed)) for seed in range(900_000, 900_400)]
    calls = [(p, a) for p, a in asked if p.count('"api_call"') == 1 and f'"api_call": "{a}"' in p]
    prompts, wanted = zip(*calls[:40], strict=True)
    right = sum(map(str.__eq__, answers_to(model, tokenizer, list(prompts)), wanted))
    assert right >= 18  # measured: 23; names of odd letters are the hard ones
