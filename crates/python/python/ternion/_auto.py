"""``AutoModelForCausalLM`` and ``AutoTokenizer``: the classes of transformers over this engine, as far as generating goes."""

from __future__ import annotations

import os
from typing import Any, Mapping, Optional, Sequence, Union

from . import _compat, _generation, _model, _params

__all__ = ["AutoModelForCausalLM", "AutoModelForCausalLm", "AutoTokenizer"]

_IGNORED = {
    "attn_implementation": None,
    "code_revision": None,
    "device_map": None,
    "dtype": None,
    "low_cpu_mem_usage": None,
    "torch_dtype": None,
    "trust_remote_code": None,
    "use_fast": True,
    "use_safetensors": None,
}
_REFUSED = {"adapter_kwargs": None, "config": None, "quantization_config": None, "state_dict": None}


def checkpoint_path(where: str, name: _model.StrPath, options: dict[str, Any]) -> str:
    """The path that ``from_pretrained`` means. Takes its options out of ``options``: what is left is not known here.

    Raises:
        UnsupportedError: An option would change the model.
    """
    revision, subfolder, file = (options.pop(key, None) for key in ("revision", "subfolder", "gguf_file"))
    options.pop("token", None)
    given = {**_REFUSED, **_IGNORED, **{key: options.pop(key) for key in [*_REFUSED, *_IGNORED] if key in options}}
    _compat.refuse(where, given, _REFUSED, {})
    _compat.ignore(where, given, _IGNORED)
    path = os.fspath(name)
    if not os.path.exists(path) and "://" not in path and path.count("/") == 1 and not path.startswith((".", "~", "/")):
        path = f"hf://{path}" if revision is None else f"hf://{path}@{revision.replace('/', '%2F')}"
    elif revision not in (None, "main"):
        raise TypeError(f"{where}: `revision` names a version of a repository, and {path!r} is none")
    parts = [part for part in (subfolder, file) if part]
    return "/".join([path, *parts])


class AutoModelForCausalLM:
    """A model with ``generate``. Made by :meth:`from_pretrained`.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/checkpoint")
        >>> inputs = tokenizer(["The sky is"])
        >>> print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=20)))
    """

    device = "cpu"

    def __init__(self, model: _model.Model, path: str) -> None:
        self.name_or_path = path
        self._model = model
        self._defaults = _generation.model_config(path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: _model.StrPath, **kwargs: Any) -> AutoModelForCausalLM:
        """Loads the checkpoint in a folder or file, or a repository of the Hugging Face hub (``owner/name``).

        Args:
            pretrained_model_name_or_path: Where it is.
            kwargs: ``revision``, ``subfolder`` and ``gguf_file`` as in transformers; what says only how to compute is ignored
                with a warning; anything else is a setting of :func:`ternion.load`, such as ``threads``.
        """
        path = checkpoint_path("AutoModelForCausalLM", pretrained_model_name_or_path, kwargs)
        return cls(_model.load(path, **kwargs), path)

    def generate(self, inputs: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Continues sequences of tokens.

        Args:
            inputs: Token ids of one sequence or of several; lists, an array of numpy or a tensor of torch. ``input_ids`` is the
                same.
            attention_mask: 0 for padding, which is left out.
            kwargs: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
                ``repetition_penalty``, ``stop_strings``, ``eos_token_id``, ``num_return_sequences``, ``generation_config``;
                also ``seed``, which transformers does not have.

        Returns:
            Prompt and answer of each sequence, padded on the right to one length, in the form of the inputs.

        Raises:
            UnsupportedError: An argument would change answers and is not supported.
        """
        ids = kwargs.pop("input_ids", inputs)
        if ids is None:
            raise TypeError("generate: `inputs` are missing")
        arguments = _generation.Arguments("generate", self._defaults, kwargs)
        batch = _generation.rows(ids, attention_mask)
        prompts = [row for row in batch for _ in range(arguments.sequences)]
        requests = ((row, arguments.params(len(row), number)) for number, row in enumerate(prompts))
        answers = _generation.answers(self._model, requests)
        tokenizer = self._model.tokenizer
        pad = next(iter([tokenizer.eos_id] if tokenizer.eos_id is not None else self._model.info["end_tokens"]), 0)
        given = _generation.as_lists(ids)
        # The whole prompt with its padding, as transformers returns it.
        wholes = [row for row in (given if given and isinstance(given[0], list) else [given]) for _ in range(arguments.sequences)]
        rows = [[*whole, *answer.tokens] for whole, answer in zip(wholes, answers)]
        return _generation.tensors(_generation.kind_of(ids), _generation.padded(rows, pad, left=False))

    def eval(self) -> AutoModelForCausalLM:
        """Does nothing: the model is never trained."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> AutoModelForCausalLM:
        """Does nothing: the model stays on the CPU."""
        return self


AutoModelForCausalLm = AutoModelForCausalLM
"""Another spelling."""


class BatchEncoding(dict):  # type: ignore[type-arg]
    """What a tokenizer returns: ``input_ids`` and ``attention_mask``, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Does nothing: the model is on the CPU."""
        return self


class AutoTokenizer:
    """A tokenizer with the methods of transformers. Made by :meth:`from_pretrained`."""

    padding_side = "left"
    """Where batches are padded. ``left``, which generating needs."""

    def __init__(self, tokenizer: _model.Tokenizer, path: str) -> None:
        self.name_or_path = path
        self._tokenizer = tokenizer
        self._native = tokenizer._native
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id
        self.pad_token_id = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self.chat_template = self._native.chat_template

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: _model.StrPath, **kwargs: Any) -> AutoTokenizer:
        """Reads the tokenizer of a checkpoint, or of a repository of the Hugging Face Hub, without its weights."""
        path = checkpoint_path("AutoTokenizer", pretrained_model_name_or_path, kwargs)
        if kwargs:
            raise TypeError(f"AutoTokenizer: unexpected keyword argument {next(iter(kwargs))!r}")
        return cls(_model.Tokenizer.open(path), path)

    def __call__(
        self,
        text: Union[str, Sequence[str]],
        *,
        add_special_tokens: bool = True,
        padding: Union[bool, str] = False,
        return_tensors: Optional[str] = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
    ) -> BatchEncoding:
        """The token ids of one text or of several. Several are padded if ``padding`` is set."""
        several = not isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        batch = [self.encode(one, add_special_tokens=add_special_tokens) for one in texts]
        return self._encoding(batch, several, padding, return_tensors, return_attention_mask)

    def encode(self, text: str, add_special_tokens: bool = True, return_tensors: Optional[str] = None) -> Any:
        """The token ids of one text."""
        ids = self._tokenizer.encode(text, add_special=add_special_tokens)
        return ids if return_tensors is None else _generation.tensors(return_tensors, [ids])

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """The text of tokens."""
        _cleanup(kwargs)
        ids = [token_ids] if isinstance(token_ids, int) else _generation.as_lists(token_ids)
        return self._tokenizer.decode(ids, skip_special=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """The texts of several sequences of tokens."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in _generation.as_lists(sequences)]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[Optional[str]]:
        """The tokens of a text, as the vocabulary writes them."""
        return [self._native.token(token) for token in self.encode(text, add_special_tokens)]

    def convert_tokens_to_ids(self, tokens: Union[str, Sequence[str]]) -> Any:
        """The id of a token as the vocabulary writes it, or those of several."""
        if isinstance(tokens, str):
            return self._native.token_id(tokens)
        return [self._native.token_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of an id as the vocabulary writes it, or those of several."""
        if isinstance(ids, int):
            return self._native.token(ids)
        return [self._native.token(token) for token in _generation.as_lists(ids)]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Optional[Sequence[Mapping[str, Any]]] = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: Union[bool, str] = False,
        return_tensors: Optional[str] = None,
        return_dict: bool = True,
        **template_args: Any,
    ) -> Any:
        """The text or the tokens of a conversation, or of several. Special tokens in messages stay text.

        Args:
            conversation: A list of messages, or a list of such lists.
            tools: What the model may call.
            add_generation_prompt: Whether the header of the assistant's turn stands at the end.
            continue_final_message: Whether the model is to continue the last message.
            tokenize: Whether tokens are returned rather than the text.
            return_dict: Whether tokens come with their attention mask.
            template_args: Further variables of the template.
        """
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        chats = list(conversation) if several else [conversation]
        options = _params.chat_options(
            {
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "template_args": template_args or None,
            }
        )
        if not tokenize:
            texts = [self._native.render_chat(list(chat), options) for chat in chats]
            return texts if several else texts[0]
        batch = [self._native.encode_prompt({"chat": list(chat)}, options) for chat in chats]
        encoding = self._encoding(batch, several, padding, return_tensors, True)
        return encoding if return_dict else encoding["input_ids"]

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def bos_token(self) -> Optional[str]:
        """The token that begins a sequence."""
        return None if self.bos_token_id is None else self._native.token(self.bos_token_id)

    @property
    def eos_token(self) -> Optional[str]:
        """The token that ends a sequence."""
        return None if self.eos_token_id is None else self._native.token(self.eos_token_id)

    def _encoding(
        self, batch: list[list[int]], several: bool, padding: Union[bool, str], kind: Optional[str], with_mask: bool
    ) -> BatchEncoding:
        mask = [[1] * len(row) for row in batch]
        if padding:
            left = self.padding_side == "left"
            batch = _generation.padded(batch, self.pad_token_id or 0, left)
            mask = _generation.padded(mask, 0, left)
        elif kind is not None and len({len(row) for row in batch}) > 1:
            raise ValueError("the texts differ in their number of tokens; padding=True makes one array of them")
        whole = several or kind is not None
        encoding = BatchEncoding(input_ids=_generation.tensors(kind, batch if whole else batch[0]))
        if with_mask:
            encoding["attention_mask"] = _generation.tensors(kind, mask if whole else mask[0])
        return encoding


def _cleanup(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name != "clean_up_tokenization_spaces":
            raise TypeError(f"decode: unexpected keyword argument {name!r}")
        _compat.refuse("decode", {name: value}, {name: False}, {name: "the text is what the tokens say"})
