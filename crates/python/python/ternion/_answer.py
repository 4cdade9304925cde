"""Answers and how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Union


@dataclass(frozen=True)
class Usage:
    """Tokens used by a request."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    cached_tokens: int = 0
    """Those of them that were in the KV cache already."""
    completion_tokens: int = 0
    """Tokens of the answer, one that ended it included."""

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timing:
    """Where the time of a request went, in seconds."""

    queued: float = 0.0
    """Waiting for other requests, until the first token."""
    prefill: float = 0.0
    """Computing the prompt."""
    decode: float = 0.0
    """From the first token to the end, which includes waiting for the reader."""
    first_token: Optional[float] = None
    """From the request to the first token; ``None`` if there was none."""


@dataclass(frozen=True)
class Ending:
    """How an answer ended."""

    finish_reason: str = "end_of_sequence"
    """``end_of_sequence``, ``stop_string``, ``stop_token``, ``max_tokens``, ``context_full``, ``cancelled`` and so on."""
    stopped_by: Union[str, int, None] = None
    """The stop string or token that ended it."""
    usage: Usage = field(default_factory=Usage)
    """Tokens used."""
    timing: Timing = field(default_factory=Timing)
    """Times taken."""
    seed: Optional[int] = None
    """The seed that the tokens were drawn with; ``None`` if they were not drawn."""
    served_by: Optional[Mapping[str, str]] = None
    """Which model answered, and which backend runs it."""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """All that the engine reported, by the names of its own fields."""


@dataclass(frozen=True)
class Answer(Ending):
    """A whole answer."""

    text: str = ""
    """The text, without stop strings and tokens that have no text."""
    tokens: list[int] = field(default_factory=list, repr=False)
    """The token ids, one that ended the answer included."""
    logprobs: list[float] = field(default_factory=list, repr=False)
    """The log-probability of each token, if they were asked for."""
    top_logprobs: list[list[Mapping[str, Any]]] = field(default_factory=list, repr=False)
    """The most probable tokens at each place as ``{"id", "logprob"}``, if they were asked for."""
    reasoning: Optional[str] = None
    """What the model thought before it answered, where the engine tells it from the text."""
    tool_calls: list[Mapping[str, Any]] = field(default_factory=list)
    """The tools that the model calls, as in OpenAI's chat API."""

    def __str__(self) -> str:
        return self.text


def ending(event: Mapping[str, Any]) -> Ending:
    """The end that an event of the type ``done`` tells."""
    return Ending(**_ending(event))


def answer(completion: Mapping[str, Any]) -> Answer:
    """An answer that the native module has put together."""
    return Answer(
        text=completion["text"],
        tokens=completion["tokens"],
        logprobs=completion.get("logprobs", []),
        top_logprobs=completion.get("top_logprobs", []),
        reasoning=completion.get("reasoning") or None,
        tool_calls=completion.get("tool_calls", []),
        **_ending(completion),
    )


def _ending(event: Mapping[str, Any]) -> dict[str, Any]:
    reason: Any = event["finish_reason"]
    stopped_by = None
    if isinstance(reason, Mapping):
        ((reason, stopped_by),) = reason.items()
    timing = {name: _seconds(time) for name, time in event["timing"].items() if name in Timing.__annotations__}
    usage = {name: count for name, count in event["usage"].items() if name in Usage.__annotations__}
    return {
        "finish_reason": reason,
        "stopped_by": stopped_by,
        "usage": Usage(**usage),
        "timing": Timing(**timing),  # type: ignore[arg-type]
        "seed": event.get("seed"),
        "served_by": event.get("served_by"),
        "details": event,
    }


def _seconds(duration: Optional[Mapping[str, int]]) -> Optional[float]:
    return None if duration is None else duration["secs"] + duration["nanos"] / 1e9
