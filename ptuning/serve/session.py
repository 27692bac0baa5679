"""What a session does without the model: names, lengths and prompts, and answers as text.

A request leaves things open (lengths, what precedes a prompt); they are as the prefix was trained
and evaluated. Where the model computes, in this process or in another, is the subclass's part.
"""

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypedDict, TypeVar, Unpack

from ptuning.data.prompts import SHORTEST
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.request import Request
from ptuning.engine.sampling import Sampling
from ptuning.engine.shared_prefix import check_weight
from ptuning.serve.answer import Answer
from ptuning.serve.chat_prompt import build_chat_prompt
from ptuning.serve.scheduler import Ticket
from ptuning.serve.text_stream import TextStream
from ptuning.tunings.artefact import LORA, PrefixInfo, TunedInfo
from ptuning.tunings.loading import refuse_other_kinds

BASE_NAME = "base"  # the model without a prefix, where a name is asked for
PREFIX_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BASE_NEW_TOKENS = 512  # longest answer without a prefix that says another length


class UnknownPrefixError(KeyError):
    """There is no prefix of that name."""

    def __str__(self) -> str:
        """Return the message as it is; KeyError would quote it."""
        return str(self.args[0])


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; see `ptuning.engine.sampling.Sampling`. None of them: greedy."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class NamedPrefix:
    """A prefix that a session knows, wherever its tensors lie."""

    name: str
    path: Path
    info: PrefixInfo


Known = TypeVar("Known", bound=NamedPrefix)
Weighted = tuple[tuple[str, float], ...]  # names of prefixes that a row sees, with their weights


class Load(NamedTuple):
    """How much a session has to do now."""

    num_rows: int  # being decoded
    num_waiting: int
    slot_bytes: int  # of keys and values


class SessionFront(ABC, Generic[Known]):
    """A base model and its prefixes, ready to answer; close it, or use it in a `with` block."""

    def __init__(
        self, tokenizer: ChatGLMTokenizer, *, context_length: int, tuned: TunedInfo | None
    ) -> None:
        """Know the tokenizer and how many tokens a row may have.

        tuned says how the model itself was tuned (LoRA or whole), None for an untouched base.
        """
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.tuned = tuned
        self._prefixes: dict[str, Known] = {}
        self._loading = threading.RLock()

    # Where the model computes

    @property
    @abstractmethod
    def load_now(self) -> Load:
        """How much there is to do."""

    @abstractmethod
    def start(
        self, request: Request, prefixes: Weighted, on_progress: Callable[[bool], None] | None
    ) -> Ticket:
        """Queue a request for a row that sees the named prefixes; see `Scheduler.submit`."""

    @abstractmethod
    def stop(self, ticket: Ticket) -> None:
        """Stop computing a request; a finished one stays as it is."""

    @abstractmethod
    def close(self) -> None:
        """Stop what is being computed, for good."""

    @abstractmethod
    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> Known:
        """Load a prefix from a folder that was found to hold one."""

    # Prefixes

    @property
    def prefixes(self) -> Mapping[str, Known]:
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
            loaded = self._load_prefix(name, Path(path), allow_other_base=allow_other_base)
            self._prefixes = {**self._prefixes, name: loaded}
        return loaded.info

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix; answers that use it are finished. UnknownPrefixError for other names."""
        with self._loading:
            self.find_prefix(name)
            self._prefixes = {key: kept for key, kept in self._prefixes.items() if key != name}

    def find_prefix(self, name: str) -> Known:
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
        on_progress: Callable[[bool], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Start an answer and return it as an iterator of text pieces.

        prefix names one, None or "base" is the model without any. strength scales what the prefix's
        keys draw in the softmax (0 is the base, 1 as trained); blend (name, w) shows another prefix
        with weight w beside this one with weight 1 - w. The answer's notice says what was left out
        of a prompt that was too long. on_progress(finished) is called by the engine's thread at
        each token.
        """
        settings = self.settings_of(prefix)
        weighted = self._weighted(prefix, strength, blend)
        new_tokens, source_length = self._lengths(settings, max_new_tokens, max_source_length)
        prompt = build_chat_prompt(
            self.tokenizer,
            query,
            history,
            max_source_length=source_length,
            source_prefix=settings.get("source_prefix") or "",
            system=system,
        )
        request = Request(
            prompt.input_ids,
            new_tokens,
            sampling=Sampling(**sampling),
            num_logprobs=num_logprobs,
        )
        stream = TextStream(self.tokenizer, clean=clean, stop=stop)
        return Answer(
            self.start(request, weighted, on_progress),
            stream,
            notice=prompt.notice,
            num_prompt_tokens=len(prompt.input_ids),
            stop_computing=self.stop,
            cancel=cancel,
        )

    def _weighted(
        self, prefix: str | None, strength: float, blend: tuple[str, float] | None
    ) -> Weighted:
        """Return what a row sees: nothing, one prefix, or two; ValueError for a wrong weight."""
        if _is_base(prefix):
            if blend is not None:
                raise ValueError("blend mixes another prefix into one; name that one as prefix.")
            return ()
        first = self.find_prefix(str(prefix)).name
        if blend is None:
            weighted: Weighted = ((first, strength),)
        else:
            name, weight = blend
            if not 0.0 <= weight <= 1.0:
                raise ValueError(
                    f"blend gives {name!r} the weight {weight}; use 0 (none of it) to 1 (it alone)."
                )
            second = self.find_prefix(name).name
            weighted = ((first, strength * (1.0 - weight)), (second, strength * weight))
        for _, weight in weighted:
            check_weight(weight)
        return weighted

    def _lengths(
        self,
        settings: Mapping[str, Any],
        max_new_tokens: int | None,
        max_source_length: int | None,
    ) -> tuple[int, int]:
        """Return the longest answer and prompt: as asked, else as trained, else what fits."""
        context = self.context_length
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

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _is_base(prefix: str | None) -> bool:
    return prefix is None or prefix == BASE_NAME
