"""A session: one frozen base, loaded once, with any number of prefixes by name.

Requests from any number of threads are decoded in one batch, each with its own prefix; without one
the answer is exactly the base's. What a request leaves open (lengths, the text before a prompt) is
as the prefix was trained and evaluated. `Session` computes in this process, `client.EngineClient`
in another.
"""

import logging
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from ptuning.data.prompts import (
    SHORTEST,
    Example,
    RowFormat,
    TextRow,
    build_rounds,
    to_example,
)
from ptuning.data.tokenization import to_generation_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Engine
from ptuning.engine.prefixes import SharedPrefix, check_weight, mix_prefixes
from ptuning.engine.request import Request, Row, Sampling
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.model.cpu.threads import limit_threads, release_helper_threads
from ptuning.serve.scheduler import OnUpdate, Scheduler, TokenBuffer
from ptuning.serve.text_stream import Answer, TextStream
from ptuning.tunings.artefact import LORA, Info
from ptuning.tunings.loading import (
    choose_dtype,
    find_model,
    load_base,
    load_tokenizer,
    refuse_other_kinds,
)
from ptuning.tunings.lora import load_adapter
from ptuning.tunings.prefix import load_prefix

BASE_NAME = "base"  # the model without a prefix, wherever a name is asked for
PREFIX_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BASE_NEW_TOKENS = 512  # answer limit where no prefix sets another
MAX_ROWS = 32  # decoded at the same time; more requests wait
MAX_PREFILL_DELAY = 3  # steps that a prompt may wait for others to be prefilled with

logger = logging.getLogger(__name__)


class UnknownPrefixError(KeyError):
    """The session has no prefix of that name."""

    def __str__(self) -> str:
        """Return the message itself; KeyError would quote it."""
        return str(self.args[0])


@dataclass(frozen=True)
class ChatOptions(Sampling):
    """How to answer: greedily unless the fields of `Sampling` say otherwise.

    strength weights the prefix's keys in the softmax: 0 is the base, 1 the prefix as trained. blend
    (name, w) adds a second prefix with weight w and reduces the first to 1 - w. system precedes the
    first question. Lengths default to those of training; num_logprobs None computes none.
    """

    strength: float = 1.0
    blend: tuple[str, float] | None = None
    system: str = ""
    stop: Sequence[str] = ()
    clean: bool = True
    max_new_tokens: int | None = None
    max_source_length: int | None = None
    num_logprobs: int | None = None


@dataclass(frozen=True)
class NamedPrefix:
    """A prefix of a session; `shared` is None where another process holds its tensors."""

    name: str
    path: Path
    info: Info
    shared: SharedPrefix | None = None


Weighted = tuple[tuple[str, float], ...]  # names of the prefixes a row sees, with their weights


class Activity(NamedTuple):
    """What a session is doing now."""

    num_rows: int  # being decoded
    num_waiting: int
    slot_bytes: int  # of keys and values


class AbstractSession(ABC):
    """Names, lengths and prompts; subclasses say where the model computes.

    Close it, or use it in a `with` block.
    """

    def __init__(
        self, tokenizer: ChatGLMTokenizer, *, context_length: int, tuned: Info | None
    ) -> None:
        """Take the most tokens of prompt and answer together, and how the model was tuned."""
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.tuned = tuned  # None: an untouched base
        self._prefixes: dict[str, NamedPrefix] = {}
        self._changing_prefixes = threading.Lock()

    @property
    @abstractmethod
    def activity(self) -> Activity:
        """What it is doing now."""

    @abstractmethod
    def start(
        self, request: Request, prefixes: Weighted, on_update: OnUpdate
    ) -> Callable[[], None]:
        """Queue a request and return a function that cancels it."""

    @abstractmethod
    def close(self) -> None:
        """Cancel everything, for good."""

    @abstractmethod
    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> NamedPrefix: ...

    @abstractmethod
    def _unload_prefix(self, name: str) -> None: ...

    @property
    def prefixes(self) -> Mapping[str, NamedPrefix]:
        """The prefixes by name, in the order they were added."""
        return dict(self._prefixes)

    def add_prefix(self, name: str, path: str | Path, *, allow_other_base: bool = False) -> Info:
        """Load a prefix (see `ptuning.load_prefix`) under a new name and return its description."""
        if name == BASE_NAME or not PREFIX_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a prefix; use at most 64 letters, digits, '.', '_' and '-', "
                f"and not {BASE_NAME!r}, which stands for the untouched model."
            )
        refuse_other_kinds(Path(path))
        if self.tuned is not None and self.tuned.tuning == LORA and not allow_other_base:
            raise ValueError(
                f"the prefix at {path} cannot be added: the base of this session has a LoRA "
                "adapter, but a prefix is trained on the untouched base; serve it separately."
            )
        with self._changing_prefixes:
            if name in self._prefixes:
                raise ValueError(
                    f"there is already a prefix {name!r}, from {self._prefixes[name].path}; remove "
                    "it first or use another name."
                )
            loaded = self._load_prefix(name, Path(path), allow_other_base=allow_other_base)
            self._prefixes = {**self._prefixes, name: loaded}
        return loaded.info

    def remove_prefix(self, name: str) -> None:
        """Remove a prefix; answers in progress keep it. UnknownPrefixError for other names."""
        with self._changing_prefixes:
            self.find_prefix(name)
            self._prefixes = {key: kept for key, kept in self._prefixes.items() if key != name}
            self._unload_prefix(name)

    def find_prefix(self, name: str) -> NamedPrefix:
        """Return the prefix of a name; UnknownPrefixError lists the names."""
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
        if name is None or name == BASE_NAME:
            return {} if self.tuned is None else self.tuned.settings
        return self.find_prefix(name).info.settings

    def chat(
        self,
        query: str,
        history: Sequence[tuple[str, str]] = (),
        prefix: str | None = None,
        *,
        cancel: threading.Event | None = None,
        on_progress: Callable[[bool], None] | None = None,
        **options: Any,
    ) -> Answer:
        """Start an answer and return it as an iterator of text pieces.

        prefix None or "base" is the model without a prefix; options are the fields of
        `ChatOptions`. on_progress(finished) is called by the engine's thread at every token. The
        answer's notice says what was left out of a prompt that was too long.
        """
        asked = ChatOptions(**options)
        settings = self.settings_of(prefix)
        weighted = self._weighted(prefix, asked.strength, asked.blend)
        new_tokens, source_length = self._lengths(settings, asked)
        input_ids, notice = build_chat_prompt(
            self.tokenizer,
            query,
            history,
            max_source_length=source_length,
            source_prefix=settings.get("source_prefix") or "",
            system=asked.system,
        )
        request = Request(input_ids, new_tokens, sampling=asked, num_logprobs=asked.num_logprobs)
        stream = TextStream(self.tokenizer, clean=asked.clean, stop=asked.stop)
        tokens = TokenBuffer(on_progress)
        return Answer(
            tokens,
            stream,
            notice=notice,
            num_prompt_tokens=len(input_ids),
            stop_computing=self.start(request, weighted, tokens.update),
            cancel=cancel,
        )

    def _weighted(
        self, prefix: str | None, strength: float, blend: tuple[str, float] | None
    ) -> Weighted:
        """Return the prefixes a row sees: none, one, or two; ValueError for a wrong weight."""
        if prefix is None or prefix == BASE_NAME:
            if blend is not None:
                raise ValueError("blend adds a second prefix; name the first one as prefix.")
            return ()
        name, weight = blend or (prefix, 0.0)
        if not 0.0 <= weight <= 1.0:
            raise ValueError(
                f"blend gives {name!r} the weight {weight}; use 0 (none of it) to 1 (it alone)."
            )
        weighted = [(prefix, strength * (1.0 - weight))]
        if blend is not None:
            weighted.append((name, strength * weight))
        for each, share in weighted:
            self.find_prefix(each)
            check_weight(share)
        return tuple(weighted)

    def _lengths(self, settings: Mapping[str, Any], asked: ChatOptions) -> tuple[int, int]:
        """Return the longest answer and prompt: as asked, else as trained, else what fits."""
        longest = self.context_length - SHORTEST
        for name, value, least in (
            ("max_new_tokens", asked.max_new_tokens, 1),
            ("max_source_length", asked.max_source_length, SHORTEST),
        ):
            if value is not None and not least <= value <= longest:
                raise ValueError(
                    f"{name} is {value}; prompt and answer have {self.context_length} tokens "
                    f"together, so use {least} to {longest}."
                )
        new_tokens = asked.max_new_tokens or settings.get("max_target_length") or BASE_NEW_TOKENS
        room = self.context_length - new_tokens
        source_length = asked.max_source_length or settings.get("max_source_length") or room
        if asked.max_new_tokens is not None and asked.max_source_length is None:
            source_length = min(source_length, room)
        return new_tokens, source_length

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class Session(AbstractSession):
    """A session that computes in this process, in a thread of its own."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        *,
        max_rows: int = MAX_ROWS,
        max_queue: int | None = None,
        tuned: Info | None = None,
    ) -> None:
        """Take over a model, without the prefix attached to it; tuned describes LoRA or full."""
        super().__init__(tokenizer, context_length=model.config.max_sequence_length, tuned=tuned)
        self.model = model.eval()
        self.model.remove_prefix()
        engine = Engine(model, max_rows=max_rows, max_prefill_delay=MAX_PREFILL_DELAY)
        self.scheduler = Scheduler(engine, max_queue=max_queue)

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
        """Load a base from a directory or hub id, or the output of LoRA or full fine-tuning.

        A tuned model answers in place of the base; an adapter is attached to the base it names.
        device None is CUDA where available. dtype (float32, float16, bfloat16) None is float32 on
        the CPU and half precision elsewhere, as in evaluation. quantization_bit 4 or 8 quantises
        the weights as they are read.
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
            logger.info("Adapter %s on %s is part of every answer", named.adapter, named.weights)
        prepack_if_room(model)
        release_helper_threads()  # from here on the engine's thread computes
        return cls(model, tokenizer, max_rows=max_rows, max_queue=max_queue, tuned=named.info)

    @property
    def activity(self) -> Activity:
        """What it is doing now."""
        scheduler = self.scheduler
        slot_bytes = scheduler.engine.slots.num_bytes
        return Activity(scheduler.num_rows, scheduler.num_waiting, slot_bytes)

    def new_row(self, request: Request, prefixes: Weighted) -> Row:
        """Return a row, not queued yet, that sees the named prefixes."""
        found = [(self.find_prefix(name).shared, weight) for name, weight in prefixes]
        shares = mix_prefixes([(shared, weight) for shared, weight in found if shared is not None])
        return self.scheduler.engine.new_row(replace(request, prefixes=shares))

    def start(
        self, request: Request, prefixes: Weighted, on_update: OnUpdate
    ) -> Callable[[], None]:
        """Queue a request and return a function that cancels it."""
        row = self.new_row(request, prefixes)
        self.scheduler.submit(row, on_update)
        return partial(self.scheduler.cancel, row)

    def close(self) -> None:
        """Cancel everything and end the engine's thread."""
        self.scheduler.close()

    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> NamedPrefix:
        info = load_prefix(self.model, path, allow_other_base=allow_other_base)
        with torch.no_grad():
            shared = SharedPrefix(self.model.transformer.prefix_for(True) or ())
        self.model.remove_prefix()  # every row brings its own
        release_helper_threads()
        logger.info("Prefix %s: %d tokens, from %s", name, info.prefix_length, path)
        return NamedPrefix(name, path, info, shared)

    def _unload_prefix(self, name: str) -> None:
        self.scheduler.release()


def build_chat_prompt(
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    *,
    max_source_length: int,
    source_prefix: str = "",
    system: str = "",
) -> tuple[list[int], str | None]:
    """Return the token ids of evaluation's prompt, and a notice of what was left out, or None.

    A prompt that is too long loses its oldest turns first; the question is truncated only where it
    is too long by itself. system precedes the first question that is kept.
    """

    def encode(num_dropped: int) -> tuple[list[int], bool]:
        example = _chat_example(query, history[num_dropped:], source_prefix, system, bool(history))
        prompts, truncated = to_generation_batch(
            tokenizer, [example], max_source_length=max_source_length
        )
        return prompts[0], truncated[0]

    # Dropping turns never adds tokens, so a binary search finds the fewest to drop.
    num_dropped = bisect_left(range(len(history)), True, key=lambda start: not encode(start)[1])
    input_ids, question_truncated = encode(num_dropped)
    left_out = []
    if num_dropped:
        turns = f"{num_dropped} turns were" if num_dropped > 1 else "turn was"
        left_out.append(f"the oldest {turns} left out")
    if question_truncated:
        left_out.append("the end of the question was cut off")
    if not left_out:
        return input_ids, None
    return input_ids, f"The prompt may have {max_source_length} tokens: {' and '.join(left_out)}."


def _chat_example(
    query: str,
    history: Sequence[tuple[str, str]],
    source_prefix: str,
    system: str,
    has_rounds: bool,
) -> Example:
    """Build evaluation's example; a chat that lost its turns keeps the form with rounds."""
    turns = [*history, (query, "")]
    if system:
        turns[0] = (f"{system}\n{turns[0][0]}", turns[0][1])
    row = TextRow(0, turns[-1][0], history=tuple(turns[:-1]))
    example = to_example(row, RowFormat(source_prefix=source_prefix), for_training=False)
    if has_rounds and not example.has_rounds:
        prompt = source_prefix + build_rounds(turns[-1][0])
        example = example._replace(prompt=prompt, has_rounds=True)
    return example
