"""``pipeline("text-generation")``: the call and the results of transformers over this engine."""

from __future__ import annotations

import os
from typing import Any, Mapping, Optional, Sequence, Union

from . import _auto, _compat, _generation, _model
from .errors import UnsupportedError

__all__ = ["pipeline", "TextGenerationPipeline"]

# What the pipeline of transformers takes where neither the call nor the model says.
_DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

_IGNORED = {
    "device": None,
    "device_map": None,
    "dtype": None,
    "framework": None,
    "torch_dtype": None,
    "trust_remote_code": None,
    "use_fast": True,
}


def pipeline(
    task: Optional[str] = None,
    model: Union[_model.StrPath, _model.Model, _auto.AutoModelForCausalLM, None] = None,
    config: Any = None,
    tokenizer: Any = None,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    model_kwargs: Optional[Mapping[str, Any]] = None,
    **kwargs: Any,
) -> TextGenerationPipeline:
    """Makes a function that continues texts and conversations.

    Args:
        task: ``text-generation``.
        model: The path of a checkpoint, a repository of the Hugging Face hub, or a model that is loaded.
        tokenizer: Ignored: a model has its own tokenizer.
        revision: The version of the repository.
        model_kwargs: Settings of :func:`ternion.load`, such as ``threads``.
        kwargs: Arguments for each call; what says only where to compute is ignored with a warning.

    Raises:
        UnsupportedError: Another task, or an argument that is not supported.
    """
    if task not in (None, "text-generation"):
        raise UnsupportedError(f"pipeline: the task {task!r} is not supported; 'text-generation'")
    if model is None:
        raise TypeError("pipeline: `model` is missing")
    if config is not None:
        raise UnsupportedError("pipeline: `config` is not supported; the model's own is used")
    _compat.ignore("pipeline", {name: kwargs.pop(name, None) for name in _IGNORED}, _IGNORED)
    if isinstance(model, (str, os.PathLike)):
        model = _auto.AutoModelForCausalLM.from_pretrained(model, revision=revision, token=token, **(model_kwargs or {}))
    elif isinstance(model, _model.Model):
        model = _auto.AutoModelForCausalLM(model, "")
    return TextGenerationPipeline(model, kwargs)


class TextGenerationPipeline:
    """What :func:`pipeline` makes."""

    task = "text-generation"

    def __init__(self, model: _auto.AutoModelForCausalLM, arguments: Mapping[str, Any]) -> None:
        self.model = model
        self._arguments = arguments

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        """Continues texts and conversations.

        Args:
            text_inputs: A text, a conversation (a list of messages), or a list of these.
            return_full_text: Whether the prompt stands before the answer. Default: ``True``.
            return_tensors: Whether token ids are returned, as ``generated_token_ids``.
            continue_final_message: Whether the last message is continued. Default: whether it is the assistant's.
            tools: What the model may call.
            prefix: A text before each prompt.
            stop_sequence: Texts that end the answer; ``stop_strings`` is the same.
            batch_size: Ignored: as many prompts as the engine takes are computed together.
            kwargs: The arguments of ``generate``, such as ``max_new_tokens`` and ``do_sample``.

        Returns:
            For one prompt a list of ``{"generated_text": ...}``, one for each of ``num_return_sequences``; for several prompts a
            list of such lists.
        """
        call = _Call({**self._arguments, **kwargs}, self.model._defaults)
        if isinstance(text_inputs, str) or _is_chat(text_inputs):
            return call.run(self.model._model, [text_inputs])[0]
        return call.run(self.model._model, list(text_inputs))


class _Call:
    """One call of a pipeline."""

    def __init__(self, given: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        take = given.pop
        self._tensors = bool(take("return_tensors", None))
        full = take("return_full_text", None)
        if full is not None and self._tensors:
            raise ValueError("`return_full_text` is mutually exclusive with `return_tensors`")
        self._full = True if full is None else bool(full)
        take("return_text", None)
        take("batch_size", None)
        self._continue = take("continue_final_message", None)
        self._prefix = take("prefix", None) or ""
        self._tools = take("tools", None)
        self._add_special = take("add_special_tokens", True)
        stop = take("stop_sequence", None)
        if stop is not None:
            given["stop_strings"] = stop
        refused = {"clean_up_tokenization_spaces": False, "documents": None, "handle_long_generation": None, "truncation": None}
        refused["tokenizer_encode_kwargs"] = None
        _compat.refuse("pipeline", {name: take(name, None) for name in refused}, refused, {})
        self._arguments = _generation.Arguments("pipeline", {**_DEFAULTS, **defaults}, given)

    def run(self, model: _model.Model, inputs: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """The results for each input."""
        count = self._arguments.sequences
        prompts = [self._tokens(model.tokenizer, one) for one in inputs]
        work = [tokens for tokens in prompts for _ in range(count)]
        requests = ((tokens, self._arguments.params(len(tokens), number)) for number, tokens in enumerate(work))
        answers = list(_generation.answers(model, requests))
        shown = [self._show(inputs[at // count], work[at], answer) for at, answer in enumerate(answers)]
        return [shown[at : at + count] for at in range(0, len(shown), count)]

    def _tokens(self, tokenizer: _model.Tokenizer, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer.encode(self._prefix + prompt, add_special=self._add_special)
        chat = list(prompt)
        continues = self._continues(chat)
        return tokenizer.encode_chat(chat, tools=self._tools, continue_final_message=continues)

    def _continues(self, chat: list[Mapping[str, Any]]) -> bool:
        return bool(chat[-1]["role"] == "assistant" if self._continue is None else self._continue)

    def _show(self, prompt: Any, tokens: list[int], answer: Any) -> dict[str, Any]:
        if self._tensors:
            return {"generated_token_ids": [*tokens, *answer.tokens]}
        text: Any = _generation.text_of(answer)
        if self._full and isinstance(prompt, str):
            text = prompt + text
        elif self._full:
            chat = list(prompt)
            if self._continues(chat):
                last = chat.pop()
                chat.append({"role": last["role"], "content": last["content"] + text})
            else:
                chat.append({"role": "assistant", "content": text})
            text = chat
        return {"generated_text": text}


def _is_chat(value: Any) -> bool:
    return not isinstance(value, str) and len(value) > 0 and isinstance(value[0], Mapping)
