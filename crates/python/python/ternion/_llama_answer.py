"""The dictionaries that llama-cpp-python returns, made of the engine's events."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

from . import _model

Event = Mapping[str, Any]


def detokenize(tokenizer: _model.Tokenizer, tokens: Sequence[int], before: Sequence[int], special: bool) -> bytes:
    """The bytes of tokens that follow others."""
    start = tokenizer.decode(before, skip_special=not special)
    text = tokenizer.decode([*before, *tokens], skip_special=not special)
    if "\ufffd" not in text and text.startswith(start):
        return text[len(start) :].encode()
    # A character is not whole.
    shown = (token for token in tokens if special or not tokenizer._native.is_special(token))
    return b"".join(tokenizer.token_bytes(token) or b"" for token in shown)


def finish_reason(event: Event) -> str:
    """Why an answer ended, in OpenAI's words."""
    reason = event["finish_reason"]
    if reason in ("max_tokens", "context_full"):
        return "length"
    return "tool_calls" if reason == "tool_calls" else "stop"


def usage(event: Event) -> dict[str, int]:
    """Tokens used. The token that ended the answer does not count."""
    counts, reason = event["usage"], event["finish_reason"]
    ended_by_token = reason == "end_of_sequence" or (isinstance(reason, Mapping) and "stop_token" in reason)
    answer = counts["completion_tokens"] - int(ended_by_token)
    return {
        "prompt_tokens": counts["prompt_tokens"],
        "completion_tokens": answer,
        "total_tokens": counts["prompt_tokens"] + answer,
    }


class Tokens:
    """Tokens whose text has not come yet."""

    def __init__(self, tokenizer: _model.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.pending: list[Event] = []

    def text(self, token: int) -> str:
        """A token as text. Parts of characters become U+FFFD."""
        return (self._tokenizer.token_bytes(token) or b"").decode("utf-8", errors="replace")

    def take(self, ending: Optional[Event] = None) -> list[Event]:
        """The tokens so far. Those that ended the answer are no part of it."""
        tokens, self.pending = self.pending, []
        if ending is None:
            return tokens
        reason = ending["finish_reason"]
        if reason == "end_of_sequence" or (isinstance(reason, Mapping) and "stop_token" in reason):
            return tokens[:-1]
        return [] if isinstance(reason, Mapping) and "stop_string" in reason else tokens


class TextShape:
    """``text_completion``"""

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: _model.Tokenizer,
        prompt: Union[str, Sequence[int]],
        logprobs: Optional[int],
        echo: bool,
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._tokens = Tokens(tokenizer)
        self._logprobs = logprobs
        self._prompt = prompt
        self._text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        self._echo = self._text if echo else ""
        self._offset = len(self._text)
        self._scored: list[Event] = []

    def score_prompt(self, model: _model.Model) -> None:
        """Takes in the log-probabilities of the prompt, which ``echo`` reports too."""
        prompt = self._prompt
        tokens = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        first: Event = {"id": tokens[0], "logprob": None}
        scores = model.score(tokens, 1, self._logprobs or 0) if len(tokens) > 1 else []
        scored = [first, *({**score, "top_logprobs": score.get("top", [])} for score in scores)]
        self._scored = scored[1:] if tokens[0] == self._tokenizer.bos_id else scored
        self._offset = 0

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """The whole answer."""
        text, logprobs = self._echo, self._show(self._scored)
        for event in events:
            if event["type"] == "token":
                self._tokens.pending.append(event)
            elif event["type"] == "text":
                text += event["text"]
                _extend(logprobs, self._show(self._tokens.take()))
            elif event["type"] == "done":
                _extend(logprobs, self._show(self._tokens.take(event)))
                return {**self._chunk(text, logprobs, finish_reason(event)), "usage": usage(event)}
        raise AssertionError("the events end with `done`")

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """The answer in chunks."""
        if self._echo:
            yield self._chunk(self._echo, self._show(self._scored), None)
        for event in events:
            if event["type"] == "token":
                self._tokens.pending.append(event)
            elif event["type"] == "text":
                yield self._chunk(event["text"], self._show(self._tokens.take()), None)
            elif event["type"] == "done":
                yield self._chunk("", None, finish_reason(event))

    def _chunk(self, text: str, logprobs: Optional[dict[str, Any]], reason: Optional[str]) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}],
        }

    def _show(self, tokens: Sequence[Event]) -> Optional[dict[str, Any]]:
        if self._logprobs is None:
            return None
        shown: dict[str, Any] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        for token in tokens:
            text, logprob = self._tokens.text(token["id"]), token["logprob"]
            top = {self._tokens.text(other["id"]): other["logprob"] for other in token.get("top_logprobs", [])}
            shown["tokens"].append(text)
            shown["text_offset"].append(self._offset)
            shown["token_logprobs"].append(logprob)
            shown["top_logprobs"].append(None if logprob is None else {**top, text: logprob})
            self._offset += len(text)
        return shown


def _extend(all_of: Optional[dict[str, Any]], more: Optional[dict[str, Any]]) -> None:
    if all_of is not None and more is not None:
        for name, values in more.items():
            all_of[name].extend(values)


class ChatShape:
    """``chat.completion`` and ``chat.completion.chunk``"""

    def __init__(self, head: dict[str, Any], tokenizer: _model.Tokenizer, logprobs: bool) -> None:
        self._head = head
        self._tokens = Tokens(tokenizer)
        self._logprobs = logprobs

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """The whole answer."""
        text, reasoning = "", ""
        logprobs: Optional[dict[str, Any]] = {"content": [], "refusal": None} if self._logprobs else None
        calls: list[dict[str, Any]] = []
        for event in events:
            kind = event["type"]
            if kind == "token":
                self._tokens.pending.append(event)
            elif kind == "text":
                text += event["text"]
            elif kind == "reasoning":
                reasoning += event["text"]
            elif kind == "tool_call":
                _add_call(calls, event)
            elif kind == "done":
                message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
                if reasoning:
                    message["reasoning_content"] = reasoning
                if calls:
                    message["tool_calls"] = calls
                if logprobs is not None:
                    logprobs["content"] = [self._show(token) for token in self._tokens.take(event)]
                reason = "tool_calls" if calls and finish_reason(event) == "stop" else finish_reason(event)
                choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
                return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(event)}
        raise AssertionError("the events end with `done`")

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """The answer in chunks."""
        yield self._chunk({"role": "assistant"})
        called = False
        for event in events:
            kind = event["type"]
            if kind == "token":
                self._tokens.pending.append(event)
            elif kind == "text":
                yield self._chunk({"content": event["text"]}, self._tokens.take())
            elif kind == "reasoning":
                yield self._chunk({"reasoning_content": event["text"]}, self._tokens.take())
            elif kind == "tool_call":
                called = True
                yield self._chunk({"tool_calls": [_call_delta(event)]}, self._tokens.take())
            elif kind == "done":
                reason = "tool_calls" if called and finish_reason(event) == "stop" else finish_reason(event)
                yield self._chunk({}, self._tokens.take(event), reason)

    def _chunk(
        self, delta: dict[str, Any], tokens: Sequence[Event] = (), reason: Optional[str] = None
    ) -> dict[str, Any]:
        shown = [self._show(token) for token in tokens] if self._logprobs else []
        logprobs = {"content": shown, "refusal": None} if shown else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _show(self, token: Event) -> dict[str, Any]:
        def one(token: Event) -> dict[str, Any]:
            text = self._tokens.text(token["id"])
            return {"token": text, "logprob": token["logprob"], "bytes": list(text.encode())}

        return {**one(token), "top_logprobs": [one(other) for other in token.get("top_logprobs", [])]}


def _call_delta(event: Event) -> dict[str, Any]:
    """The part of a tool call that an event brings."""
    function = {"arguments": event.get("arguments", "")}
    if event.get("id") is None:
        return {"index": event["index"], "function": function}
    # The first part of a call has its name.
    function = {"name": event.get("name", ""), **function}
    return {"index": event["index"], "id": event["id"], "type": "function", "function": function}


def _add_call(calls: list[dict[str, Any]], event: Event) -> None:
    """Adds the part of a tool call that an event brings."""
    if event["index"] == len(calls):
        function = {"name": event.get("name"), "arguments": ""}
        calls.append({"id": event.get("id"), "type": "function", "function": function})
    calls[event["index"]]["function"]["arguments"] += event.get("arguments", "")
