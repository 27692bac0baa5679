"""The session: one frozen base, loaded once, any number of prefixes by name, answers as streams.

Terminal, web page and API are thin faces of it. Requests from any number of threads are decoded in
one batch, each with its own prefix; without one the answer is exactly the base's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Engine
from ptuning.engine.request import Request
from ptuning.engine.shared_prefix import SharedPrefix, mix_prefixes
from ptuning.model.adapter import load_adapter
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu.linear import pack_where_roomy
from ptuning.model.cpu.threads import limit_threads, release_helper_threads
from ptuning.serve.scheduler import Scheduler, Ticket
from ptuning.serve.session import Load, NamedPrefix, SessionFront, Weighted
from ptuning.tunings.artefact import TunedInfo
from ptuning.tunings.loading import choose_dtype, find_model, load_base, load_tokenizer
from ptuning.tunings.prefix import load_prefix

MAX_ROWS = 32  # decoded together; more wait
JOIN_PATIENCE = 3  # steps that a request may wait for others to be read together with

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedPrefix(NamedPrefix):
    """A prefix in memory."""

    shared: SharedPrefix


class Session(SessionFront[LoadedPrefix]):
    """A session that computes in this process, in a thread of its own."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        *,
        max_rows: int = MAX_ROWS,
        max_queue: int | None = None,
        tuned: TunedInfo | None = None,
    ) -> None:
        """Take over a model; a prefix attached to it is detached.

        tuned says how the model itself was tuned (LoRA or whole), None for an untouched base.
        """
        super().__init__(tokenizer, context_length=model.config.max_sequence_length, tuned=tuned)
        self.model = model.eval()
        self.model.remove_prefix()
        self.scheduler = Scheduler(
            Engine(model, max_rows=max_rows, patience=JOIN_PATIENCE), max_queue=max_queue
        )

    @classmethod
    def load(
        cls,
        model_name_or_path: str | Path,
        *,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        quantization_bit: int | None = None,
        max_rows: int = MAX_ROWS,
        max_queue: int | None = None,
    ) -> Self:
        """Load the base from a directory or hub id, or what LoRA or full fine-tuning wrote.

        Such a model answers wherever the base is asked for, as it was trained; an adapter is put on
        the base that it names.
        device None takes a CUDA device if there is one. dtype (float32, float16, bfloat16) None is
        float32 on the CPU and half precision elsewhere, as in evaluation; quantization_bit 4 or 8
        quantises the weights as they are read.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        limit_threads()
        named = find_model(str(model_name_or_path))
        tokenizer = load_tokenizer(named.weights)
        model = load_base(
            named.weights, dtype=choose_dtype(device, dtype), quantization_bit=quantization_bit
        )
        model.to(device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
        if named.adapter is not None:
            load_adapter(model, named.adapter)
            logger.info("Adapter %s on %s: every answer is its own", named.adapter, named.weights)
        pack_where_roomy(model)
        release_helper_threads()  # the engine's thread computes from here on
        return cls(model, tokenizer, max_rows=max_rows, max_queue=max_queue, tuned=named.info)

    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> LoadedPrefix:
        info = load_prefix(self.model, path, allow_other_base=allow_other_base)
        with torch.no_grad():
            shared = SharedPrefix(self.model.transformer.prefix_for(True) or ())
        self.model.remove_prefix()  # rows bring their own
        release_helper_threads()
        logger.info("Prefix %s: %d tokens, from %s", name, info.prefix_length, path)
        return LoadedPrefix(name, path, info, shared)

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix, and have the engine let go of it."""
        super().remove_prefix(name)
        self.scheduler.release()

    @property
    def load_now(self) -> Load:
        """How much there is to do."""
        scheduler = self.scheduler
        slot_bytes = scheduler.engine.slots.num_bytes
        return Load(scheduler.num_rows, scheduler.num_waiting, slot_bytes)

    def start(
        self, request: Request, prefixes: Weighted, on_progress: Callable[[bool], None] | None
    ) -> Ticket:
        """Queue a request for a row that sees the named prefixes; see `Scheduler.submit`."""
        shares = mix_prefixes([(self.find_prefix(name).shared, w) for name, w in prefixes])
        return self.scheduler.submit(replace(request, shares=shares), on_progress)

    def stop(self, ticket: Ticket) -> None:
        """Stop computing a request; a finished one stays as it is."""
        self.scheduler.cancel(ticket)

    def close(self) -> None:
        """Stop what is being computed and end the thread."""
        self.scheduler.close()
