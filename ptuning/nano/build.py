"""Rebuild the nano model and the sample data: `python -m ptuning.nano.build`.

Everything comes from the grammar and the seeds in `NanoSettings` and `corpus`. The sample data is
the same everywhere; the weights are the same for one machine and one torch version, because
another processor adds in another order.
A training sequence is `prompt [gMASK] <sop> answer <eop>`; every weight is trained, and the loss is
on what follows [gMASK], as in the published preprocessing. Rows of similar length share a batch, so
that little is padded. Shapes: B batch, S tokens of the longest row.
"""

import argparse
import io
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ptuning.data.general_prompts import FILE_NAME as GENERAL_FILE
from ptuning.data.tokenizer import (
    BLANK_PIECES,
    CONTROL_PIECES,
    LEADING_PIECES,
    NEWLINE_PIECE,
    TAB_PIECE,
    TRAILING_PIECES,
    VOCABULARY_FILE,
    ChatGLMTokenizer,
    escape_whitespace,
)
from ptuning.model.attention import Attention
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import has_avx512
from ptuning.model.loss import IGNORED_LABEL
from ptuning.nano.corpus import (
    FOREIGN_CHARACTERS,
    CorpusExample,
    SampleRow,
    general_text,
    sample_corpus,
    sample_general_prompts,
    sample_rows,
)
from ptuning.nano.grammar import shuffled
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NANO_DIR, SAMPLE_DIR

logger = logging.getLogger(__name__)

MAX_WEIGHTS_BYTES = 5_000_000  # what the repository takes
FOREIGN = frozenset(FOREIGN_CHARACTERS)  # read as bytes, as any text from outside this folder is
NUM_FIXED_PIECES = len(LEADING_PIECES) + len(TRAILING_PIECES) + 256  # 256: one piece for every byte

# Of the heads that `start_copying` sets, in radians per position: entries of a head that turn
# faster than FAST tell neighbours apart; those slower than SLOW, one for each position channel,
# turn by less than a radian over a prompt of 300 tokens and an answer of 60.
FAST, SLOW = 0.04, (0.003, 0.015)
POSITION_GAIN, TRACE_GAIN, MATCH_GAIN, COPY_GAIN = 7.0, 6.0, 3.0, 8.0


@dataclass(frozen=True)
class NanoSettings:
    """Every number the nano model is made with; the shipped weights are made with the defaults."""

    vocab_size: int = 2300  # 349 of them fixed: controls, blanks and bytes
    num_vocabulary_examples: int = 20_000  # examples whose text the vocabulary is trained on
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    max_sequence_length: int = 2048  # as published; positions are rotary, nothing is stored
    initializer_range: float = 0.06
    branch_gain: float = 4.0  # see `new_model`
    copying_layer: int = 1  # where `start_copying` sets the heads that copy
    num_examples: int = 100_000  # seen once each
    batch_size: int = 48
    max_batch_tokens: int = 6_000  # with padding; splits batches of long lists
    learning_rate: float = 2e-3  # at its peak
    final_share: float = 0.05  # of the peak, where the cosine ends
    warmup_steps: int = 100
    weight_decay: float = 0.05  # matrices only
    max_grad_norm: float = 1.0
    seed: int = 20240606
    num_threads: int = 2


class TokenizedRow(NamedTuple):
    """One tokenised example; labels begin at `answer_start`, the index of <sop>."""

    ids: list[int]
    answer_start: int


def train_vocabulary(
    sentences: Iterable[str],
    path: Path | str,
    *,
    vocab_size: int,
    character_coverage: float = 0.9999,
) -> int:
    """Train a vocabulary file with the published special pieces in their order.

    Return its number of pieces. vocab_size counts every piece, the 349 fixed ones included; few
    sentences may yield fewer pieces. One thread gives the same file on every run. Raises
    ValueError where the sentences cannot fill a vocabulary at all.
    """
    path = Path(path)
    if vocab_size <= NUM_FIXED_PIECES:
        raise ValueError(
            f"vocab_size is {vocab_size}; {NUM_FIXED_PIECES} pieces are fixed, use more than that."
        )
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape_whitespace(sentence) for sentence in sentences),
            model_writer=trained,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            pad_id=3,
            control_symbols=list(CONTROL_PIECES),
            user_defined_symbols=[NEWLINE_PIECE, TAB_PIECE, *BLANK_PIECES],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"no vocabulary of {vocab_size} pieces can be trained from these sentences: {error}; "
            "give more text, or another vocab_size."
        ) from error
    model = _reorder_pieces(trained.getvalue())
    write_atomically(path, model)
    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def _reorder_pieces(trained: bytes) -> bytes:
    """Put the pieces of a trained model in the published order: an id is an index into the pieces.

    The trainer itself can only write control and user-defined pieces first.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString(trained)
    by_name = {piece.piece: piece for piece in model.pieces}
    fixed = {*LEADING_PIECES, *TRAILING_PIECES}
    byte_names = [name for name, piece in by_name.items() if piece.type == piece.BYTE]
    ordinary = [name for name in by_name if name not in fixed.union(byte_names)]
    order = [*LEADING_PIECES, *ordinary, *TRAILING_PIECES, *byte_names]
    pieces = [by_name[name] for name in order]
    del model.pieces[:]
    model.pieces.extend(pieces)
    return bytes(model.SerializeToString())


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


def start_copying(model: ChatGLMForConditionalGeneration, settings: NanoSettings) -> None:
    """Set an induction circuit in the untrained model, so that it copies from its prompt early on.

    It takes heads of two layers, none of use alone. One of layer 0 attends to the previous token,
    by its biases, and writes D entries of it, the trace. Two heads of `copying_layer` attend to
    where the trace is the current token, and write the token there. Rotary embedding turns slow
    entries least, so traces are compared in those. The gains make attention clear and leave room
    for training.
    Source: Olsson et al. 2022, https://arxiv.org/abs/2209.11895
    """
    layers, head_dim = model.transformer.layers, model.config.head_dim
    frequencies = model.transformer.inverse_frequencies  # (D/4,), the same in both channels
    places = torch.arange(head_dim).view(2, 2, -1)  # [channel, cosine or sine]: (D/4,) each
    fast = frequencies > FAST
    slow = torch.cat(
        [places[channel][:, frequencies < SLOW[channel]].flatten() for channel in (0, 1)]
    )
    generator = torch.Generator().manual_seed(settings.seed)
    square = torch.randn(settings.hidden_size, settings.hidden_size, generator=generator)
    seen, trace, *copied = torch.linalg.qr(square).Q.split(head_dim)  # (D, E), orthonormal rows
    with torch.no_grad():
        query, key, value, output = head_weights(layers[0].attention, 0)
        for part in (query, key):
            part.weight.zero_()
        for cosine, sine in places[:, :, fast]:
            key.bias[cosine] = POSITION_GAIN
            query.bias[cosine] = POSITION_GAIN * frequencies[fast].cos()  # one position back
            query.bias[sine] = -POSITION_GAIN * frequencies[fast].sin()
        value.weight.copy_(seen)
        output.copy_(TRACE_GAIN * trace.T)
        for index, written in enumerate(copied):
            copying = layers[settings.copying_layer].attention
            query, key, value, output = head_weights(copying, index)
            compared = torch.arange(len(slow)) + index * len(slow)  # each head has its own
            for part, read in ((query, seen), (key, trace)):
                part.weight.zero_()
                part.weight[slow] = MATCH_GAIN * read[compared]
            value.weight.copy_(written)
            output.copy_(COPY_GAIN * written.T)


class HeadPart(NamedTuple):
    """What makes a head's queries, keys or values: views that can be written to."""

    weight: Tensor  # (D, E)
    bias: Tensor  # (D,)


def head_weights(attention: Attention, index: int) -> tuple[HeadPart, HeadPart, HeadPart, Tensor]:
    """Return one head's query, key and value, and its columns (E, D) of the output."""
    fused, num_heads = attention.query_key_value, attention.num_heads
    weights = fused.weight.unflatten(0, (num_heads, 3, -1))[index]  # (3, D, E)
    biases = fused.bias.unflatten(0, (num_heads, 3, -1))[index]  # (3, D)
    query, key, value = (HeadPart(*part) for part in zip(weights, biases, strict=True))
    return query, key, value, attention.dense.weight.unflatten(1, (num_heads, -1))[:, index]


def tokenise(examples: Sequence[CorpusExample], tokenizer: ChatGLMTokenizer) -> list[TokenizedRow]:
    """Turn examples into sequences with their control tokens."""
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    answers = tokenizer.encode_batch([example.answer for example in examples])
    return [
        TokenizedRow(tokenizer.build_inputs_with_special_tokens(prompt, answer), len(prompt) + 1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def batches_of(rows: Sequence[TokenizedRow], settings: NanoSettings) -> list[list[TokenizedRow]]:
    """Group rows of like length, and put the groups in a random order within 32 batches."""
    rng = Random(settings.seed)
    window = 32 * settings.batch_size
    batches: list[list[TokenizedRow]] = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: len(row.ids))
        groups: list[list[TokenizedRow]] = [[]]
        for row in near:
            size = min(settings.batch_size, settings.max_batch_tokens // len(row.ids))
            if len(groups[-1]) >= max(size, 1):
                groups.append([])
            groups[-1].append(row)
        batches += shuffled(rng, groups)
    return batches


def pad_right(rows: Sequence[TokenizedRow], pad_id: int) -> dict[str, Tensor]:
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
    model: ChatGLMForConditionalGeneration, rows: Sequence[TokenizedRow], settings: NanoSettings
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
            # Weights and optimizer stay in float32. Without AVX-512 bfloat16 is emulated, and slow.
            with torch.autocast("cpu", torch.bfloat16, enabled=has_avx512()):
                loss = model(**pad_right(group, pad_id)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            yield loss.item()
    model.eval()


def write_sample(folder: Path) -> None:
    """Write train.json and dev.json, one JSON object on each line."""
    for name, rows in zip(("train.json", "dev.json"), sample_rows(), strict=True):
        write_atomically(folder / name, sample_text(rows).encode())


def sample_text(rows: Sequence[SampleRow]) -> str:
    """Return the rows as the text of an ADGEN file."""
    return "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def build_weights(folder: Path, settings: NanoSettings) -> list[float]:
    """Train vocabulary and model, write them into a folder that is empty; return the losses.

    Weights are rounded to float16 at the end: what is stored is what is computed with.
    """
    examples = sample_corpus(settings.num_examples)
    texts = (text for example in examples[: settings.num_vocabulary_examples] for text in example)
    train_vocabulary(
        (line for text in texts for line in text.split("\n") if line and FOREIGN.isdisjoint(line)),
        folder / VOCABULARY_FILE,
        vocab_size=settings.vocab_size,
        character_coverage=1.0,
    )
    tokenizer = ChatGLMTokenizer(folder / VOCABULARY_FILE)
    tokenizer.save_pretrained(folder)
    model = new_model(settings, new_config(settings, tokenizer))
    start_copying(model, settings)
    losses = list(train(model, tokenise(examples, tokenizer), settings))
    model.half().save_pretrained(folder)
    general = general_text(sample_general_prompts())
    (folder / GENERAL_FILE).write_text(general, encoding="utf-8", newline="\n")
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise ValueError(
            f"model.safetensors is {size:,} bytes; the repository takes {MAX_WEIGHTS_BYTES:,}: "
            "make hidden_size, num_layers or vocab_size of NanoSettings smaller."
        )
    return losses


def replace_folder(new: Path, folder: Path) -> None:
    """Put every file of `new` into `folder`, each whole or not at all."""
    for path in sorted(new.iterdir()):
        write_atomically(folder / path.name, path.read_bytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the sample data and, unless told otherwise, the weights."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m ptuning.nano.build", description=__doc__)
    parser.add_argument(
        "--weights", type=Path, default=NANO_DIR, help="Folder of the weights [the shipped one]."
    )
    parser.add_argument(
        "--sample", type=Path, default=SAMPLE_DIR, help="Folder of the sample data."
    )
    parser.add_argument(
        "--sample_only", action="store_true", help="Write the sample data, leave the weights."
    )
    options = parser.parse_args(arguments)
    write_sample(options.sample)
    logger.info("sample data: %s", options.sample)
    if options.sample_only:
        return
    settings = NanoSettings()
    torch.set_num_threads(settings.num_threads)
    torch.use_deterministic_algorithms(True)
    # A debugging aid that comes with the line above; it only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        losses = build_weights(Path(scratch), settings)
        replace_folder(Path(scratch), options.weights)
    logger.info("weights: %s; last loss %.3f", options.weights, losses[-1])


if __name__ == "__main__":
    main()
