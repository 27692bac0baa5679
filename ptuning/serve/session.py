"""The session: one frozen base, loaded once, any number of prefixes by name, answers as streams.

Terminal, web page and API are thin faces of it. Requests from any number of threads are decoded in
one batch, each with its own prefix; without one the answer is exactly the base's. What a request
leaves open (lengths, what precedes a prompt) is as the prefix was trained and evaluated.
"""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import psutil
import torch

from ptuning.data.tokenization import SHORTEST
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.adapter import load_adapter
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu_threads import limit_threads, release_helper_threads
from ptuning.model.engine import Engine
from ptuning.model.engine_row import Request
from ptuning.model.linear import pack_weights_
from ptuning.model.prefix_artefact import PrefixInfo, load_prefix
from ptuning.model.sampling import Sampling
from ptuning.model.shared_prefix import SharedPrefix, Shares, mix_prefixes
from ptuning.model.tuned import LORA, TunedInfo
from ptuning.serve.answer import Answer
from ptuning.serve.chat_prompt import Notice, build_chat_prompt
from ptuning.serve.scheduler import Scheduler
from ptuning.serve.text_stream import TextStream
from ptuning.serve.tuned_model import find_model, refuse_other_kinds
from ptuning.train.base_model import choose_dtype, load_base, load_tokenizer

BASE_NAME = "base"  # the model without a prefix, where a name is asked for
PREFIX_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_ROWS = 32  # decoded together; more wait
JOIN_PATIENCE = 3  # steps that a request may wait for others to be read together with
PACKING_SHARE = 0.25  # of free memory that faster copies of a CPU's weights may take
BASE_NEW_TOKENS = 512  # longest answer without a prefix that says another length

logger = logging.getLogger(__name__)


class UnknownPrefixError(KeyError):
    """There is no prefix of that name."""

    def __str__(self) -> str:
        """Return the message as it is; KeyError would quote it."""
        return str(self.args[0])


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; see `ptuning.model.sampling.Sampling`. None of them: greedy."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class LoadedPrefix:
    """A prefix in memory."""

    name: str
    path: Path
    info: PrefixInfo
    shared: SharedPrefix


class Session:
    """A base model and its prefixes, ready to answer; close it, or use it in a `with` block."""

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
        self.model = model.eval()
        self.tuned = tuned
        self.tokenizer = tokenizer
        self.model.remove_prefix()
        self.scheduler = Scheduler(
            Engine(model, max_rows=max_rows, patience=JOIN_PATIENCE), max_queue=max_queue
        )
        self._prefixes: dict[str, LoadedPrefix] = {}
        self._loading = threading.Lock()

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
        room_bytes = int(PACKING_SHARE * psutil.virtual_memory().available)
        pack_weights_(model, room_bytes=room_bytes)
        release_helper_threads()  # the engine's thread computes from here on
        return cls(model, tokenizer, max_rows=max_rows, max_queue=max_queue, tuned=named.info)

    # Prefixes

    @property
    def prefixes(self) -> Mapping[str, LoadedPrefix]:
        """The prefixes by name, in the order they were added."""
        return dict(self._prefixes)

    def add_prefix(
        self, name: str, path: str | Path, *, allow_other_base: bool = False
    ) -> PrefixInfo:
        """Load a prefix (see `ptuning.load_prefix`) under a new name and return its description."""
        if name == BASE_NAME or not PREFIX_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a prefix; use letters, digits, '.', '_' and '-', 64 at "
                f"most, and not {BASE_NAME!r}, which is the untouched model."
            )
        refuse_other_kinds(Path(path))
        if self.tuned is not None and self.tuned.tuning == LORA and not allow_other_base:
            raise ValueError(
                f"the prefix at {path} cannot be added: this session's base has a LoRA adapter, "
                "and a prefix is trained on the untouched base; serve it from another session."
            )
        with self._loading:
            if name in self._prefixes:
                raise ValueError(
                    f"there is a prefix {name!r} already, from {self._prefixes[name].path}; remove "
                    "it first or use another name."
                )
            info = load_prefix(self.model, path, allow_other_base=allow_other_base)
            with torch.no_grad():
                shared = SharedPrefix(self.model.transformer.prefix_for(True) or ())
            self.model.remove_prefix()  # rows bring their own
            loaded = LoadedPrefix(name, Path(path), info, shared)
            self._prefixes = {**self._prefixes, name: loaded}
        release_helper_threads()
        logger.info("Prefix %s: %d tokens, from %s", name, info.prefix_length, path)
        return info

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix; answers that use it are finished. UnknownPrefixError for other names."""
        with self._loading:
            self.find_prefix(name)
            self._prefixes = {key: kept for key, kept in self._prefixes.items() if key != name}

    def find_prefix(self, name: str) -> LoadedPrefix:
        """Return the prefix of a name; UnknownPrefixError says which there are."""
        if name not in self._prefixes:
            there = ", ".join(self._prefixes) or "none"
            raise UnknownPrefixError(
                f"there is no prefix {name!r}; there are: {there}, and {BASE_NAME!r} for the "
                "untouched model."
            )
        return self._prefixes[name]

    def settings_of(self, name: str | None) -> Mapping[str, Any]:
        """Return the lengths and columns that a prefix, or the tuned model, was trained with.

        Empty for an untouched base. UnknownPrefixError for other names.
        """
        if _is_base(name):
            return {} if self.tuned is None else self.tuned.settings
        return self.find_prefix(str(name)).info.settings

    # Answers

    def chat(
        self,
        query: str,
        history: Sequence[tuple[str, str]] = (),
        prefix: str | None = None,
        *,
        cancel: threading.Event | None = None,
        clean: bool = True,
        strength: float = 1.0,
        blend: tuple[str, float] | None = None,
        system: str = "",
        stop: Sequence[str] = (),
        max_new_tokens: int | None = None,
        max_source_length: int | None = None,
        num_logprobs: int | None = None,
        on_notice: Callable[[Notice], None] | None = None,
        on_progress: Callable[[bool], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Start an answer and return it as an iterator of text pieces.

        prefix names one, None or "base" is the model without any. strength scales what the prefix's
        keys draw in the softmax (0 is the base, 1 as trained); blend (name, w) shows another prefix
        with weight w beside this one with weight 1 - w. on_notice is told when the history or the
        question was too long; on_progress(finished) is called by the engine's thread at each token.
        """
        settings = self.settings_of(prefix)
        new_tokens, source_length = self._lengths(settings, max_new_tokens, max_source_length)
        prompt = build_chat_prompt(
            self.tokenizer,
            query,
            history,
            max_source_length=source_length,
            source_prefix=settings.get("source_prefix") or "",
            system=system,
        )
        if prompt.notice is not None and on_notice is not None:
            on_notice(prompt.notice)
        request = Request(
            prompt.input_ids,
            new_tokens,
            shares=self._shares(prefix, strength, blend),
            sampling=Sampling(**sampling),
            num_logprobs=num_logprobs,
        )
        return Answer(
            self.scheduler.submit(request, on_progress),
            TextStream(self.tokenizer, clean=clean, stop=stop),
            notice=prompt.notice,
            num_prompt_tokens=len(prompt.input_ids),
            stop_computing=self.scheduler.cancel,
            cancel=cancel,
        )

    def _shares(
        self, prefix: str | None, strength: float, blend: tuple[str, float] | None
    ) -> Shares:
        """Return what a row sees: nothing, one prefix, or two."""
        if _is_base(prefix):
            if blend is not None:
                raise ValueError("blend mixes another prefix into one; name that one as prefix.")
            return mix_prefixes([])
        first = self.find_prefix(str(prefix)).shared
        if blend is None:
            return mix_prefixes([(first, strength)])
        name, weight = blend
        if not 0.0 <= weight <= 1.0:
            raise ValueError(
                f"blend gives {name!r} the weight {weight}; use 0 (none of it) to 1 (it alone)."
            )
        second = self.find_prefix(name).shared
        return mix_prefixes([(first, strength * (1.0 - weight)), (second, strength * weight)])

    def _lengths(
        self,
        settings: Mapping[str, Any],
        max_new_tokens: int | None,
        max_source_length: int | None,
    ) -> tuple[int, int]:
        """Return the longest answer and prompt: as asked, else as trained, else what fits."""
        context = self.model.config.max_sequence_length
        for name, value, least in (
            ("max_new_tokens", max_new_tokens, 1),
            ("max_source_length", max_source_length, SHORTEST),
        ):
            if value is not None and not least <= value <= context - SHORTEST:
                raise ValueError(
                    f"{name} is {value}; the model reads and writes {context} tokens together, so "
                    f"use {least} to {context - SHORTEST}."
                )
        new_tokens = max_new_tokens or settings.get("max_target_length") or BASE_NEW_TOKENS
        room = context - new_tokens
        source_length = max_source_length or settings.get("max_source_length") or room
        if max_new_tokens is not None and max_source_length is None:
            source_length = min(source_length, room)
        return new_tokens, source_length

    # The end

    def close(self) -> None:
        """Stop what is being computed and end the thread."""
        self.scheduler.close()

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _is_base(prefix: str | None) -> bool:
    return prefix is None or prefix == BASE_NAME
