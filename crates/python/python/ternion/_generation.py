"""The arguments of ``generate`` in transformers, and the requests that they make."""

from __future__ import annotations

import json
import os
from collections import deque
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

from . import _answer, _compat, _model, _native

# What transformers takes where neither the call nor the model says.
_DEFAULTS: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}

# Would change answers, with the value that changes nothing.
_REFUSED = {
    "assistant_model": None,
    "bad_words_ids": None,
    "constraints": None,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "force_words_ids": None,
    "guidance_scale": None,
    "inputs_embeds": None,
    "logits_processor": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    "stopping_criteria": None,
    "streamer": None,
    "suppress_tokens": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
_ADVICE = {
    "assistant_model": "drafts are a setting of the model: `ternion.load(path, options=...)`",
    "logits_processor": "`sequence_bias` is not there either; `ternion.load(...)` has `logit_bias`",
    "stopping_criteria": "use `stop_strings` or `eos_token_id`",
    "streamer": "`ternion.load(path).stream(prompt)` gives the text piece by piece",
}
# Says how something is computed, and changes no answer.
_IGNORED = {
    "bos_token_id": None,
    "cache_implementation": None,
    "disable_compile": None,
    "early_stopping": False,
    "length_penalty": 1.0,
    "num_beam_groups": 1,
    "pad_token_id": None,
    "past_key_values": None,
    "position_ids": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "synced_gpus": False,
    "token_type_ids": None,
    "tokenizer": None,
    "trust_remote_code": None,
    "use_cache": True,
}
_KNOWN = {
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_p",
    "num_return_sequences",
    "repetition_penalty",
    "seed",
    "stop_strings",
    "temperature",
    "top_k",
    "top_p",
}


def model_config(path: str) -> dict[str, Any]:
    """What the ``generation_config.json`` of a checkpoint's folder says; nothing where there is none."""
    folder = _native.local_path(path) if path else None
    if folder is None:
        return {}
    try:
        with open(os.path.join(folder, "generation_config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    known = _KNOWN - {"eos_token_id", "seed"}  # The engine knows the tokens that end an answer.
    return {name: value for name, value in config.items() if name in known and value is not None}


class Arguments:
    """The arguments of one call, with those of the model for what it leaves out.

    Raises:
        UnsupportedError: An argument would change answers and is not supported.
        TypeError: An argument does not exist.
    """

    def __init__(self, where: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        given = dict(given)
        config = given.pop("generation_config", None)
        if config is not None:
            config = config if isinstance(config, Mapping) else config.to_diff_dict()
            given = {**{name: config[name] for name in config if name in _KNOWN | _REFUSED.keys()}, **given}
        for name in given:
            if name not in _KNOWN and name not in _REFUSED and name not in _IGNORED:
                raise TypeError(f"{where}: unexpected keyword argument {name!r}")
        _compat.refuse(where, {**_REFUSED, **given}, _REFUSED, _ADVICE)
        # A caller who names the length in one way does not mean the model's default for the other.
        if given.get("max_length") is not None and given.get("max_new_tokens") is None:
            defaults = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
        set_values = {name: value for name, value in given.items() if value is not None}
        self._values = {**_DEFAULTS, **defaults, **set_values}
        if self._values.get("max_time") is not None:
            _compat.refuse(where, self._values, {"max_time": None}, {})

    @property
    def sequences(self) -> int:
        """How many answers each prompt gets."""
        return int(self._values.get("num_return_sequences", 1))

    def params(self, prompt_length: int, number: int) -> dict[str, Any]:
        """The parameters of the answer with this number to a prompt of so many tokens."""
        values = self._values
        params: dict[str, Any] = {
            "max_tokens": self._max_tokens(prompt_length),
            "repetition_penalty": values["repetition_penalty"],
            "stop": values.get("stop_strings"),
            "temperature": 0.0,
        }
        if values["do_sample"]:
            names = ("temperature", "top_k", "top_p", "min_p")
            params.update({name: values.get(name) for name in names})
            if values.get("seed") is not None:
                params["seed"] = values["seed"] + number
        ends = values.get("eos_token_id")
        if ends is not None:
            params.update(stop_tokens=[ends] if isinstance(ends, int) else list(ends), ignore_eos=True)
        return params

    def _max_tokens(self, prompt_length: int) -> int:
        new, length = self._values.get("max_new_tokens"), self._values.get("max_length")
        if new is not None:
            return int(new)
        return 20 if length is None else max(length - prompt_length, 1)


def answers(model: _model.Model, requests: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[_answer.Answer]:
    """The answers to prompts with their parameters, in order. As many as the engine takes are computed together."""
    width = model.info["limits"]["max_sequences"] or 1
    running: deque[Any] = deque()
    for prompt, params in requests:
        if len(running) >= width:
            yield _answer.answer(running.popleft().wait())
        running.append(model._start(prompt, params, False).collect())  # type: ignore[arg-type]
    while running:
        yield _answer.answer(running.popleft().wait())


def text_of(answer: _answer.Answer) -> str:
    """The text as transformers gives it, which ends with the stop string."""
    return answer.text + answer.stopped_by if isinstance(answer.stopped_by, str) else answer.text


def rows(values: Any, mask: Any) -> list[list[int]]:
    """The token ids of a batch without padding."""
    given = as_lists(values)
    ids: list[list[int]] = given if given and isinstance(given[0], list) else [given]
    if mask is None:
        return ids
    mask = as_lists(mask)
    mask = mask if mask and isinstance(mask[0], list) else [mask]
    return [[token for token, kept in zip(row, kept_row) if kept] for row, kept_row in zip(ids, mask)]


def as_lists(values: Any) -> list[Any]:
    """An array or tensor as lists."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def padded(batch: Sequence[Sequence[int]], value: int, left: bool) -> list[list[int]]:
    """Rows of one length."""
    longest = max((len(row) for row in batch), default=0)
    fill = [[value] * (longest - len(row)) for row in batch]
    return [[*pad, *row] if left else [*row, *pad] for row, pad in zip(batch, fill)]


def tensors(kind: Optional[str], batch: Any) -> Any:
    """Lists as they are, or as arrays of numpy (``np``) or tensors of torch (``pt``)."""
    if kind is None:
        return batch
    if kind == "np":
        import numpy

        return numpy.array(batch, dtype=numpy.int64)
    if kind == "pt":
        import torch

        return torch.tensor(batch, dtype=torch.long)
    raise ValueError(f"return_tensors={kind!r} is not supported; 'np' or 'pt'")


def kind_of(values: Any) -> Optional[str]:
    """The library whose array this is, as :func:`tensors` names it."""
    module = type(values).__module__.partition(".")[0]
    return {"numpy": "np", "torch": "pt"}.get(module)
