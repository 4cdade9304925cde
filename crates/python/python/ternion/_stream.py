"""Answers piece by piece."""

from __future__ import annotations

from types import TracebackType
from typing import Any, AsyncIterator, Generic, Iterator, Mapping, Optional, TypeVar

from . import _answer, _native
from ._waiting import ready

Item = TypeVar("Item")


class Stream(Generic[Item]):
    """The items of one generation: an iterator and an asynchronous iterator.

    The generation starts when the stream is made. It ends early when the stream is closed or no longer referred to, as after a
    ``break``, and when the task that reads it is cancelled. A slow reader slows down this generation and no other.
    """

    ending: Optional[_answer.Ending]
    """How the answer ended; ``None`` before its end."""

    def __init__(self, native: _native.Stream) -> None:
        self._native = native
        self.ending = None

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        while (event := self._native.next()) is not None:
            if (item := self._item(event)) is not None:
                return item
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        while (event := await ready(self._native.poll, self._native.close)) is not None:
            if (item := self._item(event)) is not None:
                return item
        raise StopAsyncIteration

    def close(self) -> None:
        """Ends the generation, within one token."""
        self._native.close()

    async def aclose(self) -> None:
        """The same, for ``contextlib.aclosing``."""
        self.close()

    def __enter__(self) -> Stream[Item]:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    async def __aenter__(self) -> Stream[Item]:
        return self

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _item(self, event: Mapping[str, Any]) -> Optional[Item]:
        """The item for an event; ``None`` for one that is not shown."""
        raise NotImplementedError


class TextStream(Stream[str]):
    """The text of an answer, piece by piece."""

    def _item(self, event: Mapping[str, Any]) -> Optional[str]:
        kind = event["type"]
        if kind == "text":
            return str(event["text"])
        if kind == "done":
            self.ending = _answer.ending(event)
        return None


class EventStream(Stream[Mapping[str, Any]]):
    """Everything that happens, as dictionaries: ``{"type": "text", "text": "..."}``, ``{"type": "token", "id": 17}`` and so on.
    The last one has the type ``done``."""

    def _item(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        if event["type"] == "done":
            self.ending = _answer.ending(event)
        return event
