"""transformers' own common tests, run on a two-layer ChatGLM and on the nano model's tokenizer.

They are not installed with transformers. Of the installed version (`pip show transformers`), and with `pip install parameterized`:
git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers /tmp/transformers
TRANSFORMERS_SOURCE=/tmp/transformers python -m pytest -m slow tests/model/test_transformers_suite.py  # one minute

An unpacked source distribution will do too, but holds the model and training tests alone. RUN_SLOW=1 adds transformers' slow tests.
Tests that cannot apply to GLM are listed with the reason and must fail: one that passes is reported, so the lists stay true.
"""

import contextlib
import functools
import importlib
import os
import sys
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from ptuning.model.config import ChatGLMConfig

pytestmark = pytest.mark.slow

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("needs TRANSFORMERS_SOURCE, a checkout of transformers", allow_module_level=True)
TESTS = Path(SOURCE) / "tests"
if not (TESTS / "test_modeling_common.py").is_file():
    pytest.skip(
        f"TRANSFORMERS_SOURCE={SOURCE} has no tests/test_modeling_common.py",
        allow_module_level=True,
    )
pytest.importorskip("parameterized", reason="transformers' tests need pip install parameterized")

package = types.ModuleType("transformers_tests")  # not `tests`, which is our own folder
package.__path__ = [str(TESTS)]
sys.modules["transformers_tests"] = package
MISSING = []


def load(name: str, class_name: str) -> Any:
    """Return a class of transformers' tests; an empty one where the source has no such file."""
    full_name = f"transformers_tests.{name}"
    try:
        importlib.import_module(full_name)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        MISSING.append(f"{class_name}: {error}")
        sys.modules[full_name] = types.ModuleType(full_name)
        setattr(sys.modules[full_name], class_name, type(class_name, (), {}))
    return getattr(sys.modules[full_name], class_name)


load("exporters.test_export", "ExportTesterMixin")  # a base class of ModelTesterMixin
GenerationTesterMixin = load("generation.test_utils", "GenerationTesterMixin")
ModelTesterMixin = load("test_modeling_common", "ModelTesterMixin")
TrainingTesterMixin = load("test_training_mixin", "TrainingTesterMixin")
ConfigTester = load("test_configuration_common", "ConfigTester")
TokenizerTesterMixin = load("test_tokenization_common", "TokenizerTesterMixin")

EMBEDS = "positions are found from token ids, which embeddings do not show"
POSITIONS = "positions are pairs that follow from [gMASK] and <sop>, not 0, 1, 2, ..."
CONTEXT = "a prompt without [gMASK] <sop> has no place for an answer"
OF_PADDING = "outputs and keys of padding, which nothing reads, are zeros where no graph is traced"
WHOLE = "a checkpoint without all weights of the model is refused, with the names of those missing"
FIXED = "the vocabulary is fixed: tokens cannot be added"

CANNOT_APPLY = {
    "test_torch_export_static": OF_PADDING,
    "test_torch_export_dynamic": OF_PADDING,
    "test_torch_export_generate_static": OF_PADDING,
    "test_torch_export_generate_dynamic": OF_PADDING,
    "test_correct_missing_keys": WHOLE,
    "test_base_model_prefix_loads_base_weights": WHOLE,
    "test_model_weights_reload_no_missing_tied_weights": WHOLE,
    "test_inputs_embeds": EMBEDS,
    "test_inputs_embeds_matches_input_ids": EMBEDS,
    "test_generate_from_inputs_embeds_0_greedy": EMBEDS,
    "test_generate_from_inputs_embeds_1_beam_search": EMBEDS,
    "test_generate_from_inputs_embeds_with_static_cache": EMBEDS,
    "test_generate_from_random_inputs_embeds": EMBEDS,
    "test_generate_continue_from_inputs_embeds": EMBEDS,
    "test_generate_without_input_ids": CONTEXT,
    "test_training_overfit": CONTEXT,
    "test_generate_with_and_without_position_ids": POSITIONS,
    "test_left_padding_compatibility": POSITIONS,
    "test_custom_4d_attention_mask": POSITIONS,
}
AFTER_PADDING = (
    "an answer to a right-padded prompt would follow padding, which has no defined output"
)
RIGHT_PADDED = {
    "test_generate_with_static_cache": AFTER_PADDING,
    "test_generate_compile_model_forward_fullgraph": AFTER_PADDING,
}
WITHOUT_PREFIX = {"test_keep_in_fp32_modules_exist": "prefix_encoder exists only with a prefix"}
CUT = "transformers cuts the attention weights to the tokens, without the prefix's columns"
WITH_PREFIX = {
    "test_assisted_decoding_matches_greedy_search_0_random": CUT,
    "test_assisted_decoding_matches_greedy_search_1_same": CUT,
    "test_assisted_decoding_sample": CUT,
}
TOKENIZER_CANNOT_APPLY = {
    "test_torch_export_static": OF_PADDING,
    "test_torch_export_dynamic": OF_PADDING,
    "test_torch_export_generate_static": OF_PADDING,
    "test_torch_export_generate_dynamic": OF_PADDING,
    "test_correct_missing_keys": WHOLE,
    "test_base_model_prefix_loads_base_weights": WHOLE,
    "test_model_weights_reload_no_missing_tied_weights": WHOLE,
    "test_get_vocab": FIXED,
    "test_save_and_load_tokenizer": FIXED,
    "test_tokenize_special_tokens": FIXED,
    "test_added_tokens_serialization": FIXED,
    "test_pad_token_initialization": FIXED,
    "test_bos_token_with_add_bos_token_true": FIXED,
    "test_bos_token_with_add_bos_token_false": FIXED,
}


def expect_failures(reasons: dict[str, str]) -> Callable[[type], type]:
    """Mark a class's listed tests as ones that must fail; names that this transformers lacks are passed over."""

    def mark(tests: type) -> type:
        for name in reasons.keys() & set(dir(tests)):
            test = copied(getattr(tests, name))
            setattr(tests, name, pytest.mark.xfail(reason=reasons[name], strict=True)(test))
        return tests

    return mark


def copied(test: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a copy that can be marked; the mixin's own function is in every class."""

    @functools.wraps(test)
    def run(self: Any) -> None:
        self.subTest = contextlib.nullcontext  # a failed subtest fails the test
        test(self)

    return run


class Tester:
    """Make the tiny model's configuration and inputs; P prefix tokens before the keys."""

    __test__ = False  # not a class of tests
    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 13, 8, 2, 32, 4
    causal_lm_class = ChatGLMForConditionalGeneration
    is_training = True

    def __init__(self, padding: str | None = "left", **changes: Any) -> None:
        self.padding = padding
        self.changes = changes
        self.key_length = self.seq_length + (changes.get("pre_seq_len") or 0)

    def get_config(self) -> ChatGLMConfig:
        sizes = {
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "inner_hidden_size": 64,
            "pad_token_id": 0,
            "mask_token_id": 94,
            "gmask_token_id": 95,
            "bos_token_id": 96,
            "eos_token_id": 97,
        }
        return ChatGLMConfig(**sizes | self.changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[ChatGLMConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        rows = torch.randint(1, 90, (self.batch_size, self.seq_length))
        rows[:, -2:] = torch.tensor([config.gmask_token_id, config.bos_token_id])
        mask = torch.ones_like(rows)
        for row in range(0, self.batch_size, 3):
            mask[row, : 1 + row % 4] = 0
        if self.padding == "right":
            rows, mask = rows.roll(-1, 1), mask.flip(1)
        return config, {"input_ids": rows, "attention_mask": mask}


@pytest.mark.parametrize("what", MISSING or ["nothing"])
def test_the_source_has_every_mixin(what: str) -> None:
    if MISSING:
        pytest.skip(f"{SOURCE} is not a whole checkout: {what}")


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    """Every common test of a model; subclasses say how the tiny model is made."""

    all_model_classes = (ChatGLMModel, ChatGLMForConditionalGeneration)
    tester = Tester()

    def setUp(self) -> None:
        self.model_tester = self.tester
        self.enterContext(mock.patch.dict(MODEL_MAPPING_NAMES, chatglm="ChatGLMModel"))


@expect_failures(CANNOT_APPLY | WITHOUT_PREFIX)
class TestLeftPadded(CommonTests, TrainingTesterMixin, unittest.TestCase):
    model_tester = CommonTests.tester

    @unittest.skipIf(
        not hasattr(ConfigTester, "run_common_tests"), "the source has no configuration tests"
    )
    def test_config(self) -> None:
        ConfigTester(self, config_class=ChatGLMConfig, hidden_size=128).run_common_tests()


@expect_failures(CANNOT_APPLY | WITHOUT_PREFIX | RIGHT_PADDED)
class TestRightPadded(CommonTests, unittest.TestCase):
    tester = Tester("right")


@expect_failures(CANNOT_APPLY | WITHOUT_PREFIX)
class TestEager(CommonTests, unittest.TestCase):
    tester = Tester(attn_implementation="eager")


@expect_failures(CANNOT_APPLY | WITH_PREFIX)
class TestWithPrefix(CommonTests, unittest.TestCase):
    tester = Tester(pre_seq_len=3)

    def _check_attentions_for_generate(
        self, batch_size: int, attentions: Any, *rest: Any, **named: Any
    ) -> None:
        without_prefix = tuple(tuple(layer[..., 3:] for layer in step) for step in attentions)
        super()._check_attentions_for_generate(batch_size, without_prefix, *rest, **named)


@unittest.skipIf(
    not (TESTS / "fixtures").is_dir(), "the source has no texts for the tokenizer tests"
)
@expect_failures(TOKENIZER_CANNOT_APPLY)
class TestTokenizer(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = ChatGLMTokenizer
    rust_tokenizer_class = None
    test_rust_tokenizer = False
    from_pretrained_id = str(Path(__file__).parents[2] / "ptuning" / "nano" / "weights")
