"""`python -m ptuning answer FILE --output ROWS.jsonl`: a base's own answers as rows for --mix.

Mixing them into training preserves the base's behaviour without labelled data (self-distillation).
Use other prompts than those that forgetting is measured with.
"""

import argparse
import json
import logging
from pathlib import Path

import torch

from ptuning.data.general_prompts import read_general_prompts
from ptuning.data.prompts import Example
from ptuning.data.tokenization import to_generation_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Decoding, generate_answers
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.model.cpu.threads import limit_threads
from ptuning.output import Progress
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NamedModel, choose_dtype, find_model, load_base, load_tokenizer
from ptuning.tunings.lora import load_adapter
from ptuning.tunings.prefix import load_prefix

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Answer the prompts, write the rows, and say how many were dropped."""
    prompts = list(dict.fromkeys(read_general_prompts(arguments.prompts).prompts))
    named = find_model(arguments.model, tuned_flag=None)
    model, tokenizer = open_model(named, arguments.quantization_bit)
    decoding = Decoding(max_new_tokens=arguments.max_new_tokens)
    answers = answer(model, tokenizer, prompts, decoding, batch_size=arguments.batch_size)
    rows = [
        {"prompt": prompt, "response": text}
        for prompt, text in zip(prompts, answers, strict=True)
        if text is not None
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(arguments.output, lines.encode("utf-8", "backslashreplace"))
    logger.info(
        "wrote %d rows to %s; dropped %d answers that were empty or longer than %d tokens",
        len(rows),
        arguments.output,
        len(prompts) - len(rows),
        arguments.max_new_tokens,
    )
    logger.info("mix them into training with --mix %s:0.2", arguments.output)
    return 0


def open_model(
    named: NamedModel, quantization_bit: int | None, *, prefix: Path | None = None
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer]:
    """Load a base, or what was tuned, with a prefix if one is given, where it computes fastest."""
    tokenizer = load_tokenizer(named.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit_threads()
    dtype = choose_dtype(device, None)
    model = load_base(named.weights, dtype=dtype, quantization_bit=quantization_bit)
    model.to(device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
    if named.adapter is not None:
        load_adapter(model, named.adapter)
    if prefix is not None:
        load_prefix(model, prefix)
    prepack_if_room(model)
    return model, tokenizer


def answer(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    prompts: list[str],
    decoding: Decoding,
    *,
    batch_size: int,
) -> list[str | None]:
    """Return the greedy answers in order, None for an empty or unfinished one."""
    examples = [Example(prompt, "", prompt) for prompt in prompts]
    longest = model.config.max_sequence_length - (decoding.max_new_tokens or 0)
    ids, _ = to_generation_batch(tokenizer, examples, max_source_length=longest)
    answers: list[str | None] = [None] * len(prompts)
    found = generate_answers(model, ids, batch_size=batch_size, decoding=decoding)
    with Progress(len(prompts), "answering", unit="prompt") as progress:
        for index, tokens in found:
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            if text.strip() and len(tokens) != decoding.max_new_tokens:
                answers[index] = text
            progress.update()
    return answers
