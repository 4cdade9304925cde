"""``Llama``: the class of llama-cpp-python over this engine."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import uuid
import warnings
from types import SimpleNamespace, TracebackType
from typing import Any, Iterator, Mapping, Optional, Sequence, Union

from . import _compat, _llama_answer, _model
from ._llama_answer import ChatShape, TextShape
from .errors import InvalidConfigError, UnsupportedError

__all__ = ["Llama", "LlamaGrammar"]

_DEFAULT_SEED = 0xFFFFFFFF
"""Stands for a seed that is drawn, as does -1."""

_KV_TYPES = {None: None, 0: "f32", 1: "f16"}
"""By the numbers of ggml's types."""

# Of the constructor: what changes answers and is not there, with the value that changes nothing.
_REFUSED = {
    "vocab_only": False,
    "kv_overrides": None,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
    "embedding": False,
    "lora_base": None,
    "lora_scale": 1.0,
    "lora_path": None,
    "chat_format": None,
    "chat_handler": None,
    "tokenizer": None,
    "spm_infill": False,
}
_ADVICE = {
    "vocab_only": "`ternion.Tokenizer.open` reads a tokenizer alone",
    "chat_format": "the chat template of the model is used",
    "chat_handler": "the chat template of the model is used",
    "suffix": "write the form for infilling that the model knows into the prompt",
    "logits_processor": "`logit_bias` adds to the logits of tokens",
    "stopping_criteria": "use `stop`",
}
# Of the constructor: what has no meaning on a CPU, or changes only how fast it is.
_IGNORED = {
    "n_gpu_layers": 0,
    "split_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "use_mlock": False,
    "n_ubatch": 512,
    "n_threads_batch": None,
    "offload_kqv": True,
    "flash_attn": False,
    "op_offload": None,
    "swa_full": None,
    "no_perf": False,
    "last_n_tokens_size": 64,
    "numa": False,
    "draft_model": None,
    # Of older versions, which adapters still pass.
    "n_parts": -1,
    "f16_kv": True,
}
# Of a completion: as above.
_REFUSED_SAMPLING = {
    "suffix": None,
    "typical_p": 1.0,
    "tfs_z": 1.0,
    "mirostat_mode": 0,
    "stopping_criteria": None,
    "logits_processor": None,
}


class Llama:
    """A model with the methods, arguments and results of ``llama_cpp.Llama``.

    What differs: the chat template is always the model's own; ``repeat_penalty`` counts the whole prompt and answer, and
    ``presence_penalty`` and ``frequency_penalty`` the answer; log-probabilities need no ``logits_all``; several threads may use
    one object. An argument that has no meaning here warns once, and one that would change answers and is not supported raises
    :class:`UnsupportedError`.

    Example:
        >>> llm = Llama(model_path="bitnet.gguf", n_ctx=4096)
        >>> reply = llm.create_chat_completion(messages=[{"role": "user", "content": "How many days are in a week?"}])
        >>> print(reply["choices"][0]["message"]["content"])
    """

    def __init__(
        self,
        model_path: _model.StrPath,
        *,
        n_gpu_layers: int = 0,
        split_mode: int = 1,
        main_gpu: int = 0,
        tensor_split: Optional[list[float]] = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: Optional[Mapping[str, Any]] = None,
        seed: int = _DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: Optional[int] = None,
        n_threads_batch: Optional[int] = None,
        rope_scaling_type: Optional[int] = -1,
        pooling_type: int = -1,
        attention_type: int = -1,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool = False,
        op_offload: Optional[bool] = None,
        swa_full: Optional[bool] = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: Optional[str] = None,
        lora_scale: float = 1.0,
        lora_path: Optional[str] = None,
        numa: Union[bool, int] = False,
        chat_format: Optional[str] = None,
        chat_handler: Any = None,
        draft_model: Any = None,
        tokenizer: Any = None,
        type_k: Optional[int] = None,
        type_v: Optional[int] = None,
        spm_infill: bool = False,
        verbose: bool = True,
        n_parts: int = -1,
        f16_kv: bool = True,
    ) -> None:
        """Loads a model.

        Args:
            model_path: A GGUF file, or the folder of a checkpoint in another format.
            n_ctx: Tokens that prompt and answer may have together; 0 for as many as the model was made for. More than that is
                reduced to it, with a warning.
            n_threads: Threads that compute. Left out: one for each physical core.
            seed: Where the seeds of requests without one come from; -1 draws them.
            n_batch: The most prompt tokens that are computed in one step.
            use_mmap: Whether weights are used where they lie in the file.
            type_k, type_v: How keys and values are stored, both alike: 0 for f32, 1 for f16.
            verbose: Whether a line on standard error says what has been loaded.

        Raises:
            UnsupportedError: An argument asks for what this engine does not have.
            Error: The file is missing, damaged or not supported.
        """
        given = locals()
        _compat.refuse("Llama", given, _REFUSED, _ADVICE)
        _compat.ignore("Llama", given, _IGNORED)
        if type_k != type_v or type_k not in _KV_TYPES:
            raise UnsupportedError(
                f"Llama: type_k={type_k!r} and type_v={type_v!r} are not supported; both 0 (f32) or both 1 (f16)"
            )
        settings: dict[str, Any] = {"mmap": use_mmap}
        if n_threads:
            settings["threads"] = n_threads
        if n_batch != 512:
            settings["prefill_chunk"] = n_batch
        if type_k is not None:
            settings["options"] = {"kv_type": _KV_TYPES[type_k]}
        self.model_path = os.fspath(model_path)
        self.verbose = verbose
        self._model = _load(self.model_path, n_ctx, settings)
        self._info = self._model.info
        self._tokenizer = self._model.tokenizer
        self.set_seed(seed)
        if verbose:
            parameters = self._info["parameters"] / 1e6
            print(
                f"ternion: loaded {self.model_path}: {self._info['architecture']}, {parameters:.1f} M parameters, "
                f"{self._info['format']}, context {self.n_ctx()}",
                file=sys.stderr,
            )

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: Optional[str] = None,
        additional_files: Optional[list[str]] = None,
        local_dir: Optional[_model.StrPath] = None,
        local_dir_use_symlinks: Union[bool, str] = "auto",
        cache_dir: Optional[_model.StrPath] = None,
        **kwargs: Any,
    ) -> Llama:
        """Loads a model of the Hugging Face hub, which is downloaded if it is not in the cache.

        Args:
            repo_id: The repository, such as ``microsoft/bitnet-b1.58-2B-4T-gguf``.
            filename: The file in it. Left out: the whole checkpoint.
            kwargs: Arguments of the constructor.
        """
        for name, value in [("additional_files", additional_files), ("local_dir", local_dir), ("cache_dir", cache_dir)]:
            if value is not None:
                raise UnsupportedError(
                    f"Llama.from_pretrained: {name} is not supported; files are kept in the hub's cache, which HF_HOME moves"
                )
        path = f"hf://{repo_id}" if filename is None else f"hf://{repo_id}/{filename}"
        return cls(model_path=path, **kwargs)

    def __call__(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        """:meth:`create_completion`"""
        return self.create_completion(prompt, *args, **kwargs)

    def create_completion(
        self,
        prompt: Union[str, list[int]],
        suffix: Optional[str] = None,
        max_tokens: Optional[int] = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: Optional[int] = None,
        echo: bool = False,
        stop: Union[str, list[str], None] = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: Optional[int] = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: Optional[str] = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Optional[Mapping[int, float]] = None,
    ) -> Any:
        """Continues a text.

        Args:
            prompt: The text, or its tokens.
            max_tokens: The most tokens of the answer; ``None`` or 0 for no bound but the context.
            logprobs: How many of the most probable tokens are reported at each place.
            echo: Whether the prompt stands before the answer.
            stop: Texts that end the answer.
            stream: Whether an iterator of chunks is returned.

        Returns:
            A ``text_completion`` of OpenAI's API as a dictionary, or an iterator of its chunks.
        """
        _compat.refuse("create_completion", locals(), _REFUSED_SAMPLING, _ADVICE)
        params = self._params(
            max_tokens, temperature, top_p, min_p, top_k, repeat_penalty, presence_penalty, frequency_penalty, seed, stop, logit_bias
        )
        params["constraint"] = _of_grammar(grammar)
        if logprobs is not None:
            params.update(logprobs=True, top_logprobs=logprobs)
        head = {"id": f"cmpl-{uuid.uuid4()}", "object": "text_completion", **self._head(model)}
        shape = TextShape(head, self._tokenizer, prompt, logprobs, echo)
        if echo and logprobs is not None:
            shape.score_prompt(self._model)
        return self._run(shape, prompt, params, stream)

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Optional[list[Mapping[str, Any]]] = None,
        function_call: Union[str, Mapping[str, Any], None] = None,
        tools: Optional[list[Mapping[str, Any]]] = None,
        tool_choice: Union[str, Mapping[str, Any], None] = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: Union[str, list[str], None] = None,
        seed: Optional[int] = None,
        response_format: Optional[Mapping[str, Any]] = None,
        max_tokens: Optional[int] = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: Optional[str] = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Optional[Mapping[int, float]] = None,
        logprobs: Optional[bool] = None,
        top_logprobs: Optional[int] = None,
    ) -> Any:
        """Answers a conversation.

        Args:
            messages: The conversation, as in OpenAI's chat API.
            tools: What the model may call. ``functions`` is the older form.
            tool_choice: ``"auto"``, ``"none"``, ``"required"`` or one of the tools. ``function_call`` is the older form.
            response_format: ``{"type": "json_object"}``, with a ``schema`` if there is one, or OpenAI's ``json_schema``.
            stream: Whether an iterator of chunks is returned.

        Returns:
            A ``chat.completion`` of OpenAI's API as a dictionary, or an iterator of its chunks.
        """
        given = {**locals(), "suffix": None, "stopping_criteria": None}
        _compat.refuse("create_chat_completion", given, _REFUSED_SAMPLING, _ADVICE)
        params = self._params(
            max_tokens, temperature, top_p, min_p, top_k, repeat_penalty, presence_penalty, frequency_penalty, seed, stop, logit_bias
        )
        if functions is not None:
            tools = [{"type": "function", "function": function} for function in functions]
        if function_call is not None:
            named = {"type": "function", "function": function_call}
            tool_choice = function_call if isinstance(function_call, str) else named
        if logprobs:
            params.update(logprobs=True, top_logprobs=top_logprobs or 0)
        constraint = _of_grammar(grammar) or _of_response_format(response_format)
        params.update(tools=tools, tool_choice=tool_choice, constraint=constraint)
        head = {"id": f"chatcmpl-{uuid.uuid4()}", **self._head(model)}
        return self._run(ChatShape(head, self._tokenizer, bool(logprobs)), list(messages), params, stream)

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`create_chat_completion` with the types of the package ``openai``, which must be installed."""
        from openai.types.chat import ChatCompletion, ChatCompletionChunk

        result = self.create_chat_completion(*args, **kwargs)
        if kwargs.get("stream"):
            return (ChatCompletionChunk(**chunk) for chunk in result)
        return ChatCompletion(**result)

    def create_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the models of this engine generate text."""
        raise UnsupportedError("Llama: embeddings are not supported")

    embed = create_embedding

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The tokens of a text in UTF-8. ``special``: special tokens in it are control tokens."""
        if isinstance(text, str):
            raise TypeError("tokenize takes bytes, as in llama-cpp-python; `text.encode()` gives them")
        tokens = self._tokenizer.encode(text.decode("utf-8"), add_special=False, trusted=special)
        before, _ = self._tokenizer._native.added_around()
        return [*before, *tokens] if add_bos else tokens

    def detokenize(self, tokens: Sequence[int], prev_tokens: Optional[Sequence[int]] = None, special: bool = False) -> bytes:
        """The text of tokens in UTF-8, which may begin or end within a character. ``prev_tokens`` stand before them."""
        return _llama_answer.detokenize(self._tokenizer, tokens, prev_tokens or [], special)

    def set_seed(self, seed: int) -> None:
        """Sets where the seeds of requests without one come from; -1 draws them."""
        self._seeds = None if seed in (-1, _DEFAULT_SEED) else random.Random(seed)

    def reset(self) -> None:
        """Does nothing: every request begins anew. What requests have in common is computed once all the same."""

    @property
    def context_params(self) -> SimpleNamespace:
        """What adapters ask for: ``n_ctx``."""
        return SimpleNamespace(n_ctx=self.n_ctx())

    def n_ctx(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self._info["limits"]["context_length"])

    def n_vocab(self) -> int:
        """Entries of the vocabulary."""
        return int(self._info["limits"]["vocab_size"])

    def token_eos(self) -> int:
        """The token that ends a sequence; -1 if there is none."""
        eos = self._tokenizer.eos_id
        return eos if eos is not None else next(iter(self._info.get("end_tokens", [])), -1)

    def token_bos(self) -> int:
        """The token that begins a sequence; -1 if there is none."""
        bos = self._tokenizer.bos_id
        return -1 if bos is None else bos

    def close(self) -> None:
        """Frees the model. Further calls raise :class:`ClosedError`."""
        self._model.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _head(self, model: Optional[str]) -> dict[str, Any]:
        return {"created": int(time.time()), "model": self.model_path if model is None else model}

    def _params(
        self,
        max_tokens: Optional[int],
        temperature: float,
        top_p: float,
        min_p: float,
        top_k: int,
        repeat_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: Optional[int],
        stop: Union[str, list[str], None],
        logit_bias: Optional[Mapping[int, float]],
    ) -> dict[str, Any]:
        if seed is None and self._seeds is not None:
            seed = self._seeds.getrandbits(32)
        return {
            "max_tokens": max_tokens if max_tokens is not None and max_tokens > 0 else None,
            "temperature": temperature,
            "top_p": min(top_p, 1.0),
            "min_p": min_p,
            "top_k": max(top_k, 0),
            "repetition_penalty": repeat_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": None if seed == -1 else seed,
            "stop": stop,
            "logit_bias": logit_bias,
        }

    def _run(self, shape: Any, prompt: Any, params: dict[str, Any], stream: bool) -> Any:
        events = self._model.events(prompt, **params)
        return shape.chunks(events) if stream else shape.whole(events)


class LlamaGrammar:
    """What an answer must look like. Grammars of llama.cpp (GBNF) are not supported; JSON schemas are."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """JSON that is valid against a schema, which is given as text."""
        return cls(json.loads(json_schema))

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Not supported.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("LlamaGrammar: GBNF is not supported; from_json_schema, or `constraint` with `lark` of ternion.load")

    from_file = from_string


def _load(path: str, n_ctx: int, settings: dict[str, Any]) -> _model.Model:
    """Loads a model with a context of ``n_ctx``, or of as much as it was made for."""
    if n_ctx <= 0:
        return _model.load(path, **settings)
    try:
        return _model.load(path, context_length=n_ctx, **settings)
    except InvalidConfigError:
        model = _model.load(path, **settings)
        longest = model.info["limits"]["context_length"]
        if longest >= n_ctx:
            raise
    warnings.warn(f"Llama: the model was made for a context of {longest} tokens; n_ctx={n_ctx} is reduced to it", stacklevel=3)
    return model


def _of_grammar(grammar: Optional[LlamaGrammar]) -> Union[str, Mapping[str, Any], None]:
    """What an answer must look like by a grammar."""
    if grammar is not None and not isinstance(grammar, LlamaGrammar):
        raise UnsupportedError(f"grammar={grammar!r} is not supported; LlamaGrammar.from_json_schema")
    return None if grammar is None else {"json_schema": grammar.schema}


def _of_response_format(response_format: Optional[Mapping[str, Any]]) -> Union[str, Mapping[str, Any], None]:
    """What an answer must look like."""
    if response_format is None or response_format.get("type") == "text":
        return None
    kind = response_format.get("type")
    if kind == "json_object":
        schema = response_format.get("schema")
    elif kind == "json_schema":
        schema = response_format.get("json_schema", {}).get("schema")
    else:
        raise UnsupportedError(f"response_format: the type {kind!r} is not supported; text, json_object or json_schema")
    return "json_object" if schema is None else {"json_schema": schema}
