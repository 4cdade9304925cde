"""Models by the library's own names, for programs with and without asyncio."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence, Union

from . import _answer, _native, _params
from ._stream import EventStream, TextStream
from ._waiting import ready
from .errors import UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._params import Params, Prompt

__all__ = ["Model", "Tokenizer", "aload", "convert", "load"]

StrPath = Union[str, "os.PathLike[str]"]


def load(path: StrPath, model: Optional[str] = None, **settings: Any) -> Model:
    """Loads a model.

    Args:
        path: A configuration file (.toml, .json, .yaml), the folder or file of a checkpoint, or an address of the Hugging Face Hub
            (``hf://owner/name[@revision][/file]``).
        model: Which model of the configuration. Left out: its default.
        settings: Keys of the model's configuration, which win over the file: ``backend``, ``threads``, ``context_length``,
            ``max_sequences``, ``memory_limit``, ``sampling``, ``options`` and so on.

    Raises:
        Error: The files are missing, damaged or not supported, or a setting does not exist.
    """
    return Model(_native.load(os.fspath(path), model, settings).wait())


async def aload(path: StrPath, model: Optional[str] = None, **settings: Any) -> Model:
    """:func:`load` that does not block the event loop."""
    loading = _native.load(os.fspath(path), model, settings)
    return Model(await ready(loading.poll, loading.cancel))


def convert(path: StrPath, out: StrPath, format: str, *, overwrite: bool = False) -> None:
    """Writes a checkpoint in another format. Ternary weights come out bit by bit as they went in.

    Args:
        path: The folder or file of the checkpoint, or an address of the hub.
        out: The file to write for GGUF, a folder for other formats.
        format: ``gguf-i2s``, ``gguf-tq1``, ``gguf-tq2``, ``safetensors`` and the others of the command ``ternion convert``.
        overwrite: Whether a file or checkpoint at ``out`` is replaced.

    Raises:
        Error: The format does not exist or cannot hold the model, or ``out`` exists.
    """
    _native.convert(os.fspath(path), os.fspath(out), format, overwrite).wait()


class Model:
    """A loaded model. All methods may be called from several threads and tasks at the same time.

    A prompt is a text, a list of token ids, or a conversation: a list of messages as in OpenAI's chat API. Special tokens in a
    text are control tokens; in messages they stay text.

    A model does not survive a ``fork``: calls in the child process raise :class:`ClosedError`. Load models after it.
    """

    def __init__(self, native: _native.Model) -> None:
        self._native = native

    @property
    def info(self) -> dict[str, Any]:
        """What the model is, its limits and its capabilities."""
        return self._native.info()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            UnsupportedError: The tokens are not known on this side, as with most remote models.
        """
        native = self._native.tokenizer()
        if native is None:
            raise UnsupportedError("the tokenizer of this model is not known on this side")
        return Tokenizer(native)

    def stats(self) -> dict[str, int]:
        """What the model is doing, and what it has done since it was loaded."""
        return self._native.stats()

    def generate(self, prompt: Prompt, **params: Unpack[Params]) -> _answer.Answer:
        """Waits for the whole answer. Ctrl-C ends the generation.

        Raises:
            Error: The request is out of range, does not fit into the context, or the engine fails.
            TypeError: A parameter does not exist.
        """
        return _answer.answer(self._start(prompt, params, False).collect().wait())

    async def agenerate(self, prompt: Prompt, **params: Unpack[Params]) -> _answer.Answer:
        """:meth:`generate` that does not block the event loop. Cancelling the task ends the generation."""
        work = self._start(prompt, params, False).collect()
        return _answer.answer(await ready(work.poll, work.cancel))

    def stream(self, prompt: Prompt, **params: Unpack[Params]) -> TextStream:
        """The text of the answer piece by piece, for ``for`` and ``async for``.

        Errors of the request are raised with the first piece.
        """
        return TextStream(self._start(prompt, params, False))

    def events(self, prompt: Prompt, **params: Unpack[Params]) -> EventStream:
        """Everything that happens: progress of the prompt, tokens, text, the end. For ``for`` and ``async for``."""
        return EventStream(self._start(prompt, params, True))

    def score(self, tokens: Sequence[int], start: int = 1, top: int = 0) -> list[dict[str, Any]]:
        """The log-probability of each of ``tokens[start:]``, given all before it.

        Args:
            tokens: At least two token ids.
            start: The first token that is scored; at least 1.
            top: Also report this many of the most probable tokens at each place; at most 100.

        Returns:
            For each token a dictionary with ``id``, ``logprob`` and ``top``.
        """
        scores: list[dict[str, Any]] = self._native.score(list(tokens), start, top).wait()["tokens"]
        return scores

    async def ascore(self, tokens: Sequence[int], start: int = 1, top: int = 0) -> list[dict[str, Any]]:
        """:meth:`score` that does not block the event loop."""
        work = self._native.score(list(tokens), start, top)
        scores: list[dict[str, Any]] = (await ready(work.poll, work.cancel))["tokens"]
        return scores

    def close(self) -> None:
        """Frees the model once its streams have ended. Further calls raise :class:`ClosedError`."""
        self._native.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _start(self, prompt: Prompt, params: Params, with_progress: bool) -> _native.Stream:
        return self._native.generate(_params.request(prompt, params), with_progress)


class Tokenizer:
    """A tokenizer with its chat template. It needs no loaded model: ``Tokenizer.open(path)``."""

    def __init__(self, native: _native.Tokenizer) -> None:
        self._native = native

    @classmethod
    def open(cls, path: StrPath) -> Tokenizer:
        """Reads the tokenizer of the checkpoint in a folder or file, or at an address ``hf://owner/name``, of which only the files of
        the tokenizer are downloaded."""
        return cls(_native.Tokenizer.open(os.fspath(path)).wait())

    def encode(self, text: str, *, add_special: bool = True, trusted: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            text: The text.
            add_special: Whether the tokenizer adds what it adds around a text, for most models a BOS in front.
            trusted: Whether special tokens in the text are control tokens. ``False`` for text from elsewhere.
        """
        return self._native.encode(text, add_special, trusted)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The token ids of a conversation, as :meth:`Model.generate` makes them. ``options`` are those parameters of it that the
        chat template gets, such as ``tools``."""
        return self._native.encode_prompt({"chat": list(messages)}, _params.chat_options(options))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text that the chat template makes of a conversation."""
        return self._native.render_chat(list(messages), _params.chat_options(options))

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._native.decode(list(tokens), skip_special)

    def token_bytes(self, token: int) -> Optional[bytes]:
        """The bytes of a token within a text, which need not be whole characters; the name of a special token."""
        return self._native.token_bytes(token)

    @property
    def bos_id(self) -> Optional[int]:
        """The token that begins a sequence."""
        return self._native.bos_id

    @property
    def eos_id(self) -> Optional[int]:
        """The token that ends a sequence. A model may have more of them."""
        return self._native.eos_id

    @property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        return self._native.vocab_size
