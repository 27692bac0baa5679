"""The methods of peft on our model: train, switch off, save, reload, merge. docs/transformers.md lists them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptuning.model.chatglm import ChatGLMForConditionalGeneration

peft = pytest.importorskip("peft", reason="needs the peft library (pip install peft)")

Model = ChatGLMForConditionalGeneration
ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS = {
    "LoRA": peft.LoraConfig(r=4, **CAUSAL),
    "LoRA on every linear": peft.LoraConfig(r=4, target_modules="all-linear", **CAUSAL),
    "LoRA and its biases": peft.LoraConfig(r=4, bias="lora_only", target_modules=ALL, **CAUSAL),
    "LoRA and a whole module": peft.LoraConfig(r=4, modules_to_save=["final_layernorm"], **CAUSAL),
    "LoRA and some tokens": peft.LoraConfig(r=4, trainable_token_indices=[5, 6], **CAUSAL),
    "rsLoRA": peft.LoraConfig(r=4, use_rslora=True, **CAUSAL),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, target_modules=ALL, **CAUSAL),
    "IA3": peft.IA3Config(target_modules=ALL, feedforward_modules=["dense_4h_to_h"], **CAUSAL),
    "LoHa": peft.LoHaConfig(r=4, target_modules=ALL, **CAUSAL),
    "LoKr": peft.LoKrConfig(r=4, target_modules=ALL, **CAUSAL),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=ALL, **CAUSAL),
    "VeRA": peft.VeraConfig(r=8, target_modules=["query_key_value"], **CAUSAL),
    "LayerNorm tuning": peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
}


def train(model: Any, batch: dict[str, Tensor], steps: int = 3) -> list[float]:
    """Take steps of AdamW and return their losses."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_peft_trains_switches_off_reloads_and_merges(
    name: str,
    build_small: Callable[..., Model],
    training_batch: dict[str, Tensor],
    left_padded: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    base = build_small()
    before = logits(base, training_batch)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(METHODS[name]))
    losses = train(model, training_batch)
    assert losses[-1] < losses[0]
    tuned = logits(model, training_batch)
    assert (tuned - before).abs().max() > 1e-3
    assert model.generate(**left_padded, max_new_tokens=2).shape[0] == 4
    if "biases" not in name:  # peft documents that trained biases stay when the adapter is off
        with model.disable_adapter():
            torch.testing.assert_close(logits(model, training_batch), before)
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(reloaded, training_batch), tuned)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, training_batch), tuned, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = Model.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again, training_batch), tuned, atol=1e-4, rtol=1e-4)


def test_adalora_trains_and_reloads(
    build_small: Callable[..., Model], training_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    base = build_small()
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, target_modules=ALL, **CAUSAL)  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base), config)
    losses = train(model, training_batch)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(reloaded, training_batch), logits(model, training_batch))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_lora_has_the_same_gradient_with_checkpointing(
    build_small: Callable[..., Model], training_batch: dict[str, Tensor], use_reentrant: bool
) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(build_small(), copy.deepcopy(METHODS["LoRA"])).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model(**training_batch).loss.backward()
        return [value.grad for value in model.parameters() if value.requires_grad]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted)


def test_adapters_are_added_to_and_loaded_by_the_model_itself(
    build_small: Callable[..., Model], training_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build_small()
    torch.manual_seed(0)
    model.add_adapter(copy.deepcopy(METHODS["LoRA"]), adapter_name="one")
    train(model, training_batch)
    model.save_pretrained(tmp_path)
    found = build_small()
    found.load_adapter(tmp_path)
    assert torch.equal(logits(found, training_batch), logits(model, training_batch))
    found.disable_adapters()
    assert torch.equal(logits(found, training_batch), logits(build_small(), training_batch))


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
        peft.PromptEncoderConfig(num_virtual_tokens=4, **CAUSAL),
    ],
    ids=["prompt tuning", "P-tuning v1"],
)
def test_methods_that_hand_in_embeddings_are_rejected(
    config: Any, build_small: Callable[..., Model], training_batch: dict[str, Tensor]
) -> None:
    model = peft.get_peft_model(build_small(), config)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(**training_batch)


def test_ia3_needs_its_modules_named(build_small: Callable[..., Model]) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(build_small(), peft.IA3Config(**CAUSAL))


def test_a_head_tied_to_a_tuned_embedding_cannot_be_merged(
    build_small: Callable[..., Model], training_batch: dict[str, Tensor]
) -> None:
    """peft adds both products to the one table; keep the adapter, or untie the model."""
    torch.manual_seed(0)
    model = build_small(tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["word_embeddings", "lm_head"], **CAUSAL)
    model = peft.get_peft_model(model, config)
    train(model, training_batch)
    tuned = logits(model, training_batch)
    assert (logits(model.merge_and_unload(), training_batch) - tuned).abs().max() > 1e-2
