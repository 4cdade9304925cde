"""BitNet b1.58 and other ternary language models on plain CPUs.

Three ways lead to the same engine:

* the names of this library: :func:`load`, :class:`Model`, for programs with and without asyncio;
* :class:`Llama`, with the methods of llama-cpp-python;
* :func:`pipeline`, :class:`AutoModelForCausalLM` and :class:`AutoTokenizer`, with those of transformers.

    >>> import ternion
    >>> model = ternion.load("path/to/checkpoint")
    >>> for piece in model.stream([{"role": "user", "content": "How many days are in a week?"}]):
    ...     print(piece, end="", flush=True)
"""

from ._answer import Answer, Ending, Timing, Usage
from ._auto import AutoModelForCausalLM, AutoModelForCausalLm, AutoTokenizer
from ._llama import Llama, LlamaGrammar
from ._model import Model, Tokenizer, aload, convert, load
from ._native import __version__
from ._pipeline import TextGenerationPipeline, pipeline
from ._stream import EventStream, Stream, TextStream
from .errors import (
    BackendError,
    BusyError,
    CancelledError,
    ClosedError,
    ContextOverflowError,
    Error,
    InvalidConfigError,
    InvalidModelError,
    InvalidRequestError,
    IoError,
    NotFoundError,
    ResourceExhaustedError,
    TimeoutError,
    UnsupportedError,
)

__all__ = [
    "Answer",
    "AutoModelForCausalLM",
    "AutoModelForCausalLm",
    "AutoTokenizer",
    "BackendError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ContextOverflowError",
    "Ending",
    "Error",
    "EventStream",
    "InvalidConfigError",
    "InvalidModelError",
    "InvalidRequestError",
    "IoError",
    "Llama",
    "LlamaGrammar",
    "Model",
    "NotFoundError",
    "ResourceExhaustedError",
    "Stream",
    "TextGenerationPipeline",
    "TextStream",
    "TimeoutError",
    "Timing",
    "Tokenizer",
    "UnsupportedError",
    "Usage",
    "__version__",
    "aload",
    "convert",
    "load",
    "pipeline",
]
