"""Train the nano base: every weight, on the grammar's text, on the processor.

One sequence is `prompt [gMASK] <sop> answer <eop>`; the loss is on what follows [gMASK], as in the
published preprocessing. Rows of like length share a batch, so little is padded.
Shapes: B batch, S tokens of the longest row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import IGNORED_LABEL, ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.nano.corpus import Example
from ptuning.nano.grammar import shuffled


@dataclass(frozen=True)
class NanoSettings:
    """Every number the nano model is made with; the shipped weights are made with the defaults."""

    vocab_size: int = 1700  # 349 of them fixed: controls, blanks and bytes
    num_vocabulary_examples: int = 20_000  # examples whose text the vocabulary is trained on
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    max_sequence_length: int = 2048  # as published; positions are rotary, nothing is stored
    initializer_range: float = 0.06
    branch_gain: float = 4.0  # see `new_model`
    num_examples: int = 64_000  # seen once each
    batch_size: int = 48
    learning_rate: float = 2e-3  # at its peak
    final_share: float = 0.05  # of the peak, where the cosine ends
    warmup_steps: int = 100
    weight_decay: float = 0.05  # matrices only
    max_grad_norm: float = 1.0
    seed: int = 20240606
    num_threads: int = 2


class Row(NamedTuple):
    """One tokenised example; labels begin at `answer_start`, the index of <sop>."""

    ids: list[int]
    answer_start: int


def new_config(settings: NanoSettings, tokenizer: ChatGLMTokenizer) -> ChatGLMConfig:
    """Describe the nano model: ChatGLM-6B's architecture, small sizes, the vocabulary's own ids."""
    ids = tokenizer.get_vocab()
    return ChatGLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        inner_hidden_size=4 * settings.hidden_size,
        max_sequence_length=settings.max_sequence_length,
        bos_token_id=tokenizer.sop_token_id,
        eos_token_id=tokenizer.eop_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=ids["[MASK]"],
        gmask_token_id=ids["[gMASK]"],
        tie_word_embeddings=True,
        initializer_range=settings.initializer_range,
    )


def new_model(settings: NanoSettings, config: ChatGLMConfig) -> ChatGLMForConditionalGeneration:
    """Build the untrained model.

    ChatGLM's skip carries its input times sqrt(2 * 28) = 7.48, so what a layer adds starts too
    faint to learn from; the two matrices that write to the skip start `branch_gain` times larger.
    """
    torch.manual_seed(settings.seed)
    model = ChatGLMForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                parameter.mul_(settings.branch_gain)
    return model


def tokenise(examples: Sequence[Example], tokenizer: ChatGLMTokenizer) -> list[Row]:
    """Turn examples into sequences with their control tokens."""
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    answers = tokenizer.encode_batch([example.answer for example in examples])
    return [
        Row(tokenizer.build_inputs_with_special_tokens(prompt, answer), len(prompt) + 1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def batches_of(rows: Sequence[Row], settings: NanoSettings) -> list[list[Row]]:
    """Group rows of like length, and put the groups in a random order within 32 batches."""
    rng = Random(settings.seed)
    window = 32 * settings.batch_size
    batches: list[list[Row]] = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: len(row.ids))
        size = settings.batch_size
        batches += shuffled(rng, [near[i : i + size] for i in range(0, len(near), size)])
    return batches


def pad_right(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels of one batch, each (B, S)."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)  # (B, S)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for index, row in enumerate(rows):
        length = len(row.ids)
        input_ids[index, :length] = torch.tensor(row.ids)
        attention_mask[index, :length] = 1
        labels[index, row.answer_start : length] = input_ids[index, row.answer_start : length]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def rate_at(step: int, num_steps: int, settings: NanoSettings) -> float:
    """Return the share of the peak rate at a step: warm-up times a cosine to `final_share`."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
    return warmup * (settings.final_share + (1.0 - settings.final_share) * cosine)


def train(
    model: ChatGLMForConditionalGeneration, rows: Sequence[Row], settings: NanoSettings
) -> Iterator[float]:
    """Train the model in place, one pass over the rows; yield each step's loss."""
    batches = batches_of(rows, settings)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, len(batches), settings))
    model.train()
    pad_id = int(model.config.pad_token_id or 0)
    with tqdm(batches, desc="pretraining", unit="step", mininterval=1.0) as progress:
        for group in progress:
            with torch.autocast("cpu", torch.bfloat16):  # weights and optimizer stay in float32
                loss = model(**pad_right(group, pad_id)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            yield loss.item()
    model.eval()
