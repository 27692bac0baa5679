"""Operators, bytes moved and peak memory of a step of ChatGLM-6B on CUDA, computed without a GPU.

    python -m benchmarks.fake_cuda [--bits 0 8 4] [--rows 1 16] [--recompute 0 28] [--json FILE]

A training step is forward, backward, clipping and fused AdamW in bfloat16 with a prefix of 128
tokens; the second of two steps counts, because the first creates the optimizer state. A decoding
step adds one token to each row. Both run on fake tensors (`benchmarks.fake_device`): an operator
fails where devices or dtypes differ, as on a GPU, and where the host would wait for the device. One
row has 128 tokens; several have ADGEN's lengths, 16 of them 1,547 tokens. `other GB` excludes
matrix products; `plan` is what `python -m ptuning plan` says.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.fake_device import DEVICE, FakeCuda
from benchmarks.row_lengths import ADGEN, RowLength
from benchmarks.setting import json_file, make_model, write_json
from benchmarks.traffic import Tracker
from ptuning.data.tokenization import IGNORED_LABEL, pad_right
from ptuning.engine.prefixes import PrefixCache, SharedPrefix, mix_prefixes
from ptuning.engine.slots import Slots
from ptuning.engine.step import run_step
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.layers import prepare_quantized_
from ptuning.train.fit import checkpoint_layers
from ptuning.train.memory import Batch, size_of, training_memory

DTYPE = torch.bfloat16
PREFIX_LENGTH = 128
ONE_ROW = RowLength(64, 64)  # as published
DECODED_COLUMNS = 128  # a prompt and an answer of up to 64 tokens each


class Figures(NamedTuple):
    """What one step does; bytes."""

    operators: int
    moved: int
    moved_outside_products: int
    peak: int
    plan: int | None  # None for decoding: the plan knows only whole answers
    mixed: list[str]  # operators with tensors on two devices


def row_lengths(num_rows: int) -> list[RowLength]:
    """Return the lengths of num_rows ADGEN rows, or of one row of the greatest length."""
    return [ONE_ROW] if num_rows == 1 else list(islice(cycle(ADGEN), num_rows))


def make_batch(lengths: Sequence[RowLength], config: ChatGLMConfig) -> dict[str, Tensor]:
    """Return the collator's batch of rows of these lengths, on the CPU; call outside FakeCuda."""
    rows = []
    for prompt, answer in lengths:
        ids = torch.full((prompt + answer,), 20)
        ids[prompt - 1], ids[prompt] = config.gmask_token_id, config.bos_token_id
        labels = torch.where(torch.arange(len(ids)) < prompt, IGNORED_LABEL, ids)
        rows.append({"input_ids": ids, "labels": labels})
    return pad_right(rows, pad_id=3)


def make_meta_model(bits: int) -> ChatGLMForConditionalGeneration:
    """Return a ChatGLM-6B with a prefix on the device `meta`; call outside FakeCuda."""
    dtype = str(DTYPE).removeprefix("torch.")
    flags = Namespace(
        size="chatglm-6b", dtype=dtype, device="meta", prefix=PREFIX_LENGTH, threads=None
    )
    with torch.device("meta"):
        model = make_model(flags)
    if bits:
        prepare_quantized_(model, bits, "triton")
    return model


def move_to_fake_cuda(model: nn.Module) -> None:
    """Replace every parameter and buffer by a fake one; tied parameters stay tied."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in moved:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    moved[tensor] = fake
                tensors[name] = moved[tensor]


def train_step(
    bits: int, num_rows: int, checkpointed_layers: int = 0, chunk_tokens: int | None = None
) -> Figures:
    """Take two optimizer steps and return the figures of the second.

    chunk_tokens is the number of answer tokens per chunk of the loss; None: the device's default.
    """
    lengths = row_lengths(num_rows)
    model = make_meta_model(bits).train()
    checkpoint_layers(model, checkpointed_layers)
    model.loss_chunk_tokens = chunk_tokens
    batch = make_batch(lengths, model.config)
    tracker = Tracker()
    with FakeCuda(tracker.launch):
        move_to_fake_cuda(model)
        encoder = model.prefix_encoder
        assert encoder is not None, "make_model attaches one"
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=True)
        tracker.adopt([*model.parameters(), *model.buffers()])
        with tracker:
            for _ in range(2):
                tracker.start_step()
                on_cuda = {name: value.to(DEVICE) for name, value in batch.items()}
                model(**on_cuda).loss.backward()
                torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    plan = training_memory(
        size_of(model.config, DTYPE, on_cpu=False, weight_bits=bits, prefix_length=PREFIX_LENGTH),
        Batch(tuple(map(sum, lengths)), sum(answer for _, answer in lengths)),
        checkpointed_layers=checkpointed_layers,
        chunk_tokens=chunk_tokens,
    )
    return figures_of(tracker, plan.total)


def decode_step(bits: int, num_rows: int) -> Figures:
    """Take one decoding step, without sampling, and return its figures."""
    model = make_meta_model(bits).eval()
    tracker = Tracker()
    with FakeCuda(tracker.launch), torch.no_grad():
        move_to_fake_cuda(model)
        prefix = SharedPrefix(model.transformer.prefix_for(True) or ())
        prefixes = PrefixCache(DEVICE).lookup([mix_prefixes([(prefix, 1.0)])] * num_rows)
        slots = Slots(model, num_rows, DECODED_COLUMNS)
        numbers = torch.empty(4, num_rows, dtype=torch.long, device=DEVICE)
        tracker.adopt([*model.parameters(), *model.buffers(), *slots.keys, *slots.values])
        tracker.adopt([*prefix.key_values, numbers])
        with tracker:
            tracker.start_step()
            states = run_step(model.transformer, numbers, slots, DECODED_COLUMNS, prefixes)
            model.lm_head(states).argmax(-1)
    return figures_of(tracker, None)


def figures_of(tracker: Tracker, plan: int | None) -> Figures:
    """Return the figures of a tracker."""
    return Figures(
        operators=sum(tracker.operators.values()),
        moved=sum(tracker.moved.values()),
        moved_outside_products=tracker.moved_outside_products,
        peak=tracker.peak,
        plan=plan,
        mixed=tracker.mixed,
    )


def parse(argv: list[str]) -> Namespace:
    """Read the flags."""
    parser = ArgumentParser(prog="python -m benchmarks.fake_cuda", description=__doc__)
    parser.add_argument("--work", nargs="+", choices=("train", "decode"), default=["train"])
    parser.add_argument(
        "--bits", nargs="+", type=int, choices=(0, 4, 8), default=[0, 8, 4], help="0 is bfloat16"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--recompute", nargs="+", type=int, default=[0], help="layers that are checkpointed"
    )
    parser.add_argument(
        "--chunk_tokens", type=int, help="answer tokens in the loss at a time; unset is by device"
    )
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print the table line by line."""
    flags = parse(argv)
    sys.stdout.write(
        f"GB of 10**9; torch {torch.__version__}\n{'':<8}{'weights':<10}{'rows':>5}"
        f"{'recompute':>11}{'operators':>11}{'GB moved':>10}{'other GB':>10}"
        f"{'peak GB':>9}{'plan GB':>9}{'error %':>9}\n"
    )
    cases = [
        (work, bits, rows, layers)
        for work in flags.work
        for bits in flags.bits
        for rows in flags.rows
        for layers in (flags.recompute if work == "train" else [0])
    ]
    lines = []
    for work, bits, rows, layers in cases:
        if work == "train":
            found = train_step(bits, rows, layers, flags.chunk_tokens)
        else:
            found = decode_step(bits, rows)
        sys.stdout.write(
            f"{work:<8}{f'int{bits}' if bits else 'bfloat16':<10}{rows:>5}{layers:>11}"
            f"{found.operators:>11}{found.moved / 1e9:>10.2f}"
            f"{found.moved_outside_products / 1e9:>10.2f}{found.peak / 1e9:>9.3f}"
        )
        if found.plan is not None:
            sys.stdout.write(
                f"{found.plan / 1e9:>9.3f}{100 * (found.plan / found.peak - 1):>+9.1f}"
            )
        sys.stdout.write("\n")
        sys.stdout.flush()
        case = {"work": work, "bits": bits, "rows": rows, "recompute": layers}
        lines.append({**case, **found._asdict()})
    write_json(flags, {"torch": torch.__version__, "steps": lines})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
