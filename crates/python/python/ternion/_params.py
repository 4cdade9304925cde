"""Keyword arguments of a generation, and the request that they make."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, Iterable, Mapping, Optional, Sequence, TypedDict, Union

if TYPE_CHECKING:
    Message = Mapping[str, Any]
    Prompt = Union[str, Sequence[int], Sequence[Message]]


class Params(TypedDict, total=False):
    """What a generation may be told besides its prompt. What is left out has the model's default."""

    max_tokens: Optional[int]
    """The most tokens of the answer. Left out: until the model ends or the context is full."""
    stop: Union[str, Iterable[str], None]
    """The answer ends before the first of these texts."""
    stop_tokens: Iterable[int]
    """The answer ends with one of these tokens."""
    ignore_eos: bool
    """Go on past the tokens that end an answer."""
    temperature: Optional[float]
    """0 takes the most probable token."""
    top_k: Optional[int]
    """Keep this many of the most probable tokens; 0 keeps all."""
    top_p: Optional[float]
    """Keep the smallest set of tokens whose probabilities sum to this; 1 keeps all."""
    min_p: Optional[float]
    """Keep tokens at least this many times as probable as the most probable one; 0 keeps all."""
    repetition_penalty: Optional[float]
    """Over 1: tokens of prompt and answer become less probable."""
    presence_penalty: Optional[float]
    """Subtracted once from the logit of each token that the answer has."""
    frequency_penalty: Optional[float]
    """Subtracted from the logit of a token for each time that the answer has it."""
    logit_bias: Optional[Mapping[int, float]]
    """Added to the logits of these tokens; ``float("-inf")`` forbids a token."""
    seed: Optional[int]
    """The same seed with the same prompt gives the same answer."""
    logprobs: bool
    """Report the log-probability of each token."""
    top_logprobs: int
    """Report this many of the most probable tokens at each place; at most 100."""
    constraint: Union[str, Mapping[str, Any], None]
    """What the answer must look like: ``{"json_schema": {...}}``, ``"json_object"``, ``{"regex": "..."}``, ``{"choice": [...]}``
    or ``{"lark": "..."}``."""
    tools: Optional[Sequence[Mapping[str, Any]]]
    """The tools that the model may call, as in OpenAI's chat API."""
    tool_choice: Union[str, Mapping[str, Any], None]
    """Whether it may, must or must not call one: ``"auto"``, ``"none"``, ``"required"`` or a tool."""
    parallel_tool_calls: bool
    """Whether it may call several at a time. Default: ``True``."""
    reasoning_budget: Optional[int]
    """The most tokens of the model's thought, which is then ended for it."""
    template_args: Optional[Mapping[str, Any]]
    """Further variables of the chat template, such as ``enable_thinking``."""
    add_generation_prompt: bool
    """Whether the header of the assistant's turn stands at the end of the prompt. Default: ``True``."""
    continue_final_message: bool
    """Whether the model continues the last message instead of answering it."""
    context_policy: Union[str, Mapping[str, Any], None]
    """What is done with a prompt that does not fit into the context. Left out: what the configuration says."""
    document: Optional[str]
    """A long text that the prompt is about. It is what a context policy cuts first."""


_SAMPLING = {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
}
_CHAT = {"tools", "tool_choice", "parallel_tool_calls", "template_args", "add_generation_prompt", "continue_final_message"}


def request(prompt: Prompt, params: Params) -> dict[str, Any]:
    """The request in the form that the native module reads. Keys that are ``None`` are left out.

    Raises:
        TypeError: An argument does not exist, or the prompt has a type that is no prompt.
    """
    request: dict[str, Any] = {"prompt": _prompt(prompt)}
    for name, value in params.items():
        if name not in Params.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is None:
            continue
        if name == "stop":
            request["stop"] = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
        elif name == "stop_tokens":
            request["stop_tokens"] = [int(token) for token in value]  # type: ignore[attr-defined]
        elif name == "logit_bias":
            biases = {int(token): float(bias) for token, bias in value.items()}  # type: ignore[attr-defined]
            request.setdefault("sampling", {})["logit_bias"] = biases
        elif name in _SAMPLING:
            request.setdefault("sampling", {})[name] = value
        elif name in _CHAT:
            request.setdefault("chat", {})[name] = value
        else:
            request[name] = value
    return request


def chat_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The options for the chat template alone."""
    options: dict[str, Any] = request("", params).get("chat", {})  # type: ignore[arg-type]
    return options


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    what = "a prompt is a text, a list of token ids or a list of messages, not"
    if isinstance(prompt, (bytes, Mapping)) or not hasattr(prompt, "__iter__"):
        raise TypeError(f"{what} {type(prompt).__name__}")
    # Arrays of numpy and tensors of torch become lists.
    items: list[Any] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not items:
        return {"tokens": []}
    if all(isinstance(item, Mapping) for item in items):
        if all("text" in item and "role" not in item for item in items):
            return {"segments": items}
        for place, item in enumerate(items):
            if "role" not in item:
                raise TypeError(f"message {place} of the prompt has no 'role'; it has {sorted(item)}")
        return {"chat": items}
    for item in items:
        if not hasattr(item, "__index__"):
            raise TypeError(f"{what} a list of {type(item).__name__}")
    return {"tokens": [index(item) for item in items]}
