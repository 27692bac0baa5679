"""What transformers and accelerate offer a model, and works here: docs/transformers.md names these tests."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    WatermarkDetector,
    WatermarkingConfig,
    pipeline,
)

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from tests.conftest import EOP, NANO

Model = ChatGLMForConditionalGeneration
QUESTION = "类型#裤*版型#宽松*颜色#白色"


@pytest.fixture
def nano(loaded_nano: tuple[Model, Any]) -> Model:
    return copy.deepcopy(loaded_nano[0])


@pytest.fixture
def tokenizer(loaded_nano: tuple[Model, Any]) -> Any:
    return loaded_nano[1]


def greedy(model: Model, inputs: dict[str, Tensor], count: int = 10, **options: Any) -> list[Any]:
    """Return every row's new tokens, none of which ends early."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False} | options
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def same_logits(found: Model, wanted: Model, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found(**batch).logits, wanted(**batch).logits)


# ---- generate


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [30]},
        {"begin_suppress_tokens": [30]},
        {"forced_eos_token_id": EOP},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
        {"do_sample": True, "top_h": 0.4},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 3, "do_sample": True},
        {"max_time": 10.0},
    ],
    ids=lambda options: "+".join(options),
)
def test_processors_and_warpers_run(
    small: Model, left_padded: dict[str, Tensor], options: dict[str, Any]
) -> None:
    found = small.generate(**left_padded, max_new_tokens=8, **options)
    assert left_padded["input_ids"].shape[1] < found.shape[1] <= 8 + 11
    assert int(found.max()) < small.config.vocab_size


def test_words_can_be_banned_and_favoured(small: Model, left_padded: dict[str, Tensor]) -> None:
    first = greedy(small, left_padded)[0][0]
    banned = greedy(small, left_padded, bad_words_ids=[[first]])
    assert first not in {token for row in banned for token in row}
    favoured = greedy(small, left_padded, sequence_bias=[[[first], 1e4]])
    assert {token for row in favoured for token in row} == {first}


def test_guidance_by_the_prompt_itself_changes_nothing(
    small: Model, prompts: list[list[int]]
) -> None:
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    negative = {"negative_prompt_ids": torch.tensor(prompts[1:2])}
    wanted = greedy(small, inputs)
    itself = {"negative_prompt_ids": inputs["input_ids"]}
    assert greedy(small, inputs, guidance_scale=3.0, **itself) == wanted
    assert greedy(small, inputs, guidance_scale=3.0, **negative) != wanted


def test_a_watermark_is_detected(small: Model, prompts: list[list[int]]) -> None:
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    config = WatermarkingConfig(bias=8.0, seeding_scheme="selfhash")
    detector = WatermarkDetector(small.config, device="cpu", watermarking_config=config)
    marked = greedy(small, inputs, count=60, watermarking_config=config)
    assert detector(torch.tensor(marked), return_dict=True).prediction.all()
    assert not detector(torch.tensor(greedy(small, inputs, count=60)), return_dict=True).prediction


def test_transition_scores_are_log_probabilities(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    output = small.generate(
        **left_padded,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = small.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
    steps = torch.stack(output.logits, dim=1).log_softmax(-1)  # (B, 4, V)
    wanted = steps.gather(-1, output.sequences[:, -4:, None]).squeeze(-1)
    torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_a_quantised_cache_answers_alike(nano: Model, tokenizer: Any, backend: str) -> None:
    package, axis = {"quanto": ("optimum.quanto", 0), "hqq": ("hqq", 1)}[backend]
    pytest.importorskip(package)
    config = {
        "backend": backend,
        "nbits": 4,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": 16,
    }
    inputs = tokenizer(["你好！", QUESTION], padding=True, return_tensors="pt")
    found = greedy(nano, inputs, cache_implementation="quantized", cache_config=config)
    assert found == greedy(nano, inputs)


def test_a_padded_batch_continues_from_its_cache(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    settings = {"do_sample": False, "eos_token_id": -1}
    wanted = small.generate(**left_padded, max_new_tokens=8, **settings)
    first = small.generate(
        **left_padded, max_new_tokens=3, return_dict_in_generate=True, **settings
    )
    mask = torch.nn.functional.pad(left_padded["attention_mask"], (0, 3), value=1)
    more = small.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=5,
        **settings,
    )
    assert torch.equal(more, wanted)


def test_a_cropped_cache_continues(small: Model, prompts: list[list[int]]) -> None:
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    wanted = greedy(small, inputs)[0]
    first = small.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1,
                           return_dict_in_generate=True)  # fmt: skip
    cache = first.past_key_values
    cache.crop(-5)  # 7 of the 8 new tokens are in it: the last has not been read
    known = first.sequences[:, : len(prompts[0]) + 3]
    assert [
        *wanted[:3],
        *greedy(small, {"input_ids": known}, 7, past_key_values=cache)[0],
    ] == wanted


def test_a_function_of_ones_own_may_decode(small: Model, prompts: list[list[int]]) -> None:
    def first_token(model: Model, input_ids: Tensor, **_: Any) -> Tensor:
        return model(input_ids).logits[:, -1].argmax(-1)

    inputs = {"input_ids": torch.tensor(prompts[:1])}
    found = small.generate(**inputs, custom_generate=first_token)
    assert found.tolist() == [greedy(small, inputs)[0][0]]


def test_token_healing_is_rejected(nano: Model, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="<sop>"):
        nano.generate(
            **tokenizer(QUESTION, return_tensors="pt"), token_healing=True, tokenizer=tokenizer
        )


# ---- loading


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16, "float32", torch.float16])
def test_every_form_of_dtype_loads(dtype: Any) -> None:
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}
    stored = AutoModelForCausalLM.from_pretrained(NANO).dtype
    found = AutoModelForCausalLM.from_pretrained(NANO, dtype=dtype).dtype
    assert found == (stored if dtype == "auto" else wanted.get(dtype, dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {
            "device_map": {
                "transformer.word_embeddings": "cpu",
                "transformer.layers": "disk",
                "transformer.final_layernorm": "cpu",
                "lm_head": "cpu",
            }
        },
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
        {"use_safetensors": True},
        {"trust_remote_code": True},
        {"key_mapping": {"^nothing": "here"}},
    ],
    ids=str,
)
def test_every_way_of_loading_gives_the_same_logits(
    options: dict[str, Any], nano: Model, tokenizer: Any, tmp_path: Path
) -> None:
    if "disk" in str(options):
        options = {**options, "offload_folder": tmp_path}
    found = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, **options)
    same_logits(found, nano, dict(tokenizer(QUESTION, return_tensors="pt")))


def test_fewer_layers_load_when_asked_for(nano: Model) -> None:
    found = AutoModelForCausalLM.from_pretrained(NANO, num_layers=1)
    assert len(found.transformer.layers) == 1 < len(nano.transformer.layers)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch", "load_and_dispatch"])
def test_accelerate_places_the_weights(
    how: str, nano: Model, tokenizer: Any, tmp_path: Path
) -> None:
    batch = dict(tokenizer(QUESTION, return_tensors="pt"))
    layers = {f"transformer.layers.{index}": "disk" for index in range(nano.config.num_layers)}
    places = {
        "transformer.word_embeddings": "cpu",
        **layers,
        "transformer.final_layernorm": "cpu",
        "lm_head": "cpu",
    }
    placed = copy.deepcopy(nano)
    if how == "cpu_offload":
        placed = accelerate.cpu_offload(placed, "cpu")
    elif how == "disk_offload":
        placed = accelerate.disk_offload(placed, tmp_path, "cpu")
    elif how == "dispatch":
        placed = accelerate.dispatch_model(placed, places, "cpu", offload_dir=tmp_path)
    else:
        nano.save_pretrained(tmp_path / "saved")
        with accelerate.init_empty_weights():
            placed = Model(nano.config)
        placed.tie_weights()
        placed = accelerate.load_checkpoint_and_dispatch(
            placed.eval(), str(tmp_path / "saved"), places, offload_folder=tmp_path
        )
    same_logits(placed, nano, batch)


def test_quanto_quantises_while_loading(tokenizer: Any) -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    config = QuantoConfig(weights="int8")
    model = AutoModelForCausalLM.from_pretrained(NANO, quantization_config=config)
    assert "QLinear" in {type(module).__name__ for module in model.modules()}
    assert model.generate(**tokenizer(QUESTION, return_tensors="pt"), max_new_tokens=3).numel()


# ---- saving


def save_in_shards(model: Model, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="500KB")
    assert (folder / "model.safetensors.index.json").is_file()


def save_a_half_state(model: Model, folder: Path) -> None:
    state = {name: value.half() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)


@pytest.mark.parametrize("save", [Model.save_pretrained, save_in_shards, save_a_half_state])
def test_what_save_pretrained_wrote_loads_again(
    save: Callable[[Model, Path], None], nano: Model, tokenizer: Any, tmp_path: Path
) -> None:
    save(nano, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = nano.half().float() if save is save_a_half_state else nano
    same_logits(found, wanted, dict(tokenizer(QUESTION, return_tensors="pt")))


def through_torch_save(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state(model: Model) -> Model:
    made = Model(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save, through_a_state],
    ids=["deepcopy", "pickle", "torch.save", "state_dict"],
)  # fmt: skip
def test_a_copy_has_the_same_logits(
    copied: Callable[[Model], Model], small: Model, left_padded: dict[str, Tensor]
) -> None:
    same_logits(copied(small), small, left_padded)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("options", "size"), [({"new_num_tokens": 70}, 70), ({"new_num_tokens": 63}, 63),
    ({"new_num_tokens": 65, "pad_to_multiple_of": 64}, 128)])  # fmt: skip
def test_resized_embeddings_keep_the_old_tokens(
    build_small: Callable[..., Model], left_padded: dict[str, Tensor], options: dict[str, int],
    size: int, is_tied: bool, tmp_path: Path
) -> None:  # fmt: skip
    model = build_small(tie_word_embeddings=is_tied)
    with torch.no_grad():
        wanted = model(**left_padded).logits
    model.resize_token_embeddings(**options, mean_resizing=False)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = model(**left_padded).logits
    assert model.config.vocab_size == found.shape[-1] == size
    torch.testing.assert_close(found[..., :63], wanted[..., :63])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation_of_torch_changes_nothing(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    found = torch.ao.quantization.quantize_dynamic(small, {torch.nn.Linear})
    same_logits(found, small, left_padded)
    assert {type(module) for module in found.modules()} == {type(m) for m in small.modules()}


def test_auto_model_has_the_head() -> None:
    assert isinstance(AutoModel.from_pretrained(NANO), Model)


# ---- pipeline


@pytest.fixture
def writer(nano: Model, tokenizer: Any) -> Any:
    return pipeline(
        "text-generation", model=nano, tokenizer=tokenizer, max_new_tokens=8, do_sample=False
    )


def test_a_pipeline_answers_a_text(writer: Any, nano: Model, tokenizer: Any) -> None:
    inputs = tokenizer(QUESTION, return_tensors="pt")
    answer = greedy(nano, inputs, 8, min_new_tokens=0)[0]
    wanted = tokenizer.decode(answer, skip_special_tokens=True)
    assert writer(QUESTION, return_full_text=False) == [{"generated_text": wanted}]


def test_a_pipeline_answers_a_batch_as_single_texts(writer: Any) -> None:
    texts = [QUESTION, "你好！", "类型#裙*颜色#蓝色*风格#简约"]
    assert writer(texts, batch_size=3) == [writer(text) for text in texts]


def test_a_pipeline_answers_conversations(writer: Any) -> None:
    one = [{"role": "user", "content": "你好！"}]
    answer = writer(one)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert answer["content"]
    two = [*one, answer, {"role": "user", "content": QUESTION}]
    assert [turn["role"] for turn in writer(two)[0]["generated_text"]] == ["user", "assistant"] * 2


def test_a_pipeline_returns_tokens_and_several_answers(writer: Any) -> None:
    assert writer(QUESTION, return_tensors=True)[0]["generated_token_ids"]
    assert len(writer(QUESTION, do_sample=True, num_return_sequences=3)) == 3


def test_a_pipeline_uses_the_prefix(writer: Any) -> None:
    plain = writer(QUESTION)
    torch.manual_seed(0)
    with torch.no_grad():
        writer.model.add_prefix(4).embedding.weight.mul_(5)
    assert writer(QUESTION) != plain
    assert writer(QUESTION, use_prefix=False) == plain


def test_every_test_that_the_page_names_is_there() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "transformers.md").read_text(encoding="utf-8")
    code = "".join(file.read_text(encoding="utf-8") for file in (root / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 50
    assert not named - set(re.findall(r"def (test_\w+)", code))
