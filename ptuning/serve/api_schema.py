"""What may be asked over HTTP: OpenAI's request bodies, and this project's options beside them.

A parameter that cannot be honoured is refused, never ignored, unless its value asks for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_STOPS = 16
IGNORED = {  # who asks and how it is booked: nothing that changes an answer
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
NEUTRAL: dict[str, list[Any]] = {  # not available: only values that ask for nothing
    "n": [1],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}

Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]


class Strict(BaseModel):
    """Refuses unknown keys and numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """Whether the last chunk tells the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Blend(Strict):
    """Another prefix beside the one asked for; weight 1 is the other alone."""

    model: str
    weight: Annotated[float, Field(ge=0, le=1)]


class CommonBody(Strict):
    """What both kinds of completion share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    # Beside OpenAI's:
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    prefix_strength: Annotated[float, Field(ge=0, le=1000)] = 1.0
    blend: Blend | None = None
    clean: bool | None = None
    max_source_length: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def leave_out_what_asks_for_nothing(cls, data: Any) -> Any:
        """Drop parameters that are not available where their value has no effect."""
        if not isinstance(data, Mapping):
            return data
        kept = {}
        for name, value in data.items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise ValueError(
                    f"{name} is {_short(value)}, which this server does not do; leave it out."
                )
            if name not in NEUTRAL and name not in IGNORED:
                kept[name] = value
        return kept

    def sampling(self) -> dict[str, Any]:
        """Return the options of `Sampling`: greedy unless the request asks for a draw."""
        draws = self.top_p is not None or self.top_k is not None
        given = {
            "temperature": 1.0 if draws and self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}

    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(Strict):
    """A part of a message; text is all this model reads."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Turns(NamedTuple):
    """A chat as the prompt builder takes it."""

    system: str
    history: list[tuple[str, str]]
    query: str


class ChatBody(CommonBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self) -> Turns:
        """Return system text, earlier turns and the question.

        ValueError unless user and assistant take turns and the user speaks last.
        """
        messages = list(self.messages)
        system = []
        while messages and messages[0].role in ("system", "developer"):
            system.append(messages.pop(0).text)
        for index, message in enumerate(messages):
            due = "assistant" if index % 2 else "user"
            if message.role != due:
                raise ValueError(
                    f"messages[{index + len(system)}] has the role {message.role} where {due} is "
                    "due; after system messages, user and assistant take turns."
                )
        if len(messages) % 2 == 0:
            raise ValueError("messages end without a question; the last one is the user's.")
        pairs = zip(messages[:-1:2], messages[1::2], strict=True)
        history = [(question.text, answer.text) for question, answer in pairs]
        return Turns("\n".join(system), history, messages[-1].text)


class CompletionBody(CommonBody):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def query(self) -> str:
        """The prompt as one text."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class PrefixBody(Strict):
    """POST /v1/prefixes."""

    name: str
    path: str
    allow_other_base: bool = False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
