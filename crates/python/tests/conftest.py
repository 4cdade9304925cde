"""Models for the tests: the small one of the repository, as a folder and as a GGUF file with I2_S."""

import json
import pathlib

import pytest

import ternion

FIXTURES = pathlib.Path(__file__).parents[3] / "fixtures"


@pytest.fixture(scope="session")
def tiny() -> str:
    return str(FIXTURES / "ternion-tiny")


@pytest.fixture(scope="session")
def gguf(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gguf") / "bitnet.gguf"
    ternion.convert(tiny, path, "gguf-i2s")
    return str(path)


@pytest.fixture(scope="session")
def model(tiny: str) -> ternion.Model:
    return ternion.load(tiny)


@pytest.fixture(scope="session")
def llm(gguf: str) -> ternion.Llama:
    return ternion.Llama(gguf, n_ctx=1024, verbose=False)


def golden(path: str) -> "dict[str, dict]":
    """What transformers computes on a checkpoint, by the names of the cases."""
    with open(f"{path}/golden.json", encoding="utf-8") as file:
        return {case["name"]: case for case in json.load(file)["cases"]}


@pytest.fixture(scope="session")
def prompts(tiny: str) -> "dict[str, dict]":
    """Texts and conversations with their tokens."""
    return golden(tiny)


@pytest.fixture(scope="session")
def packed() -> str:
    """A checkpoint with random weights."""
    return str(FIXTURES / "tiny-packed")


@pytest.fixture(scope="session")
def continuations(packed: str) -> "dict[str, dict]":
    """Greedy continuations on `packed` that do not depend on the order of float sums."""
    strict = {name: case for name, case in golden(packed).items() if case["strict"] and case.get("greedy_strict")}
    assert strict
    return strict
