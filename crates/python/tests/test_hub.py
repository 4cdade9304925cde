"""Models of the Hugging Face Hub, from the hub of the tests."""

import os
import pathlib

import pytest

import ternion
from ternion import AutoModelForCausalLM, AutoTokenizer, Llama, pipeline

WEEK = [{"role": "user", "content": "How many days are in a week?"}]
SEVEN = "There are seven days in a week."


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache. The hub has `test/tiny` and, as GGUF, `test/gguf`; `test/gated` needs a token."""
    if "TERNION_TEST_HUB" not in os.environ:
        pytest.skip("started by `cargo xtask python`, which starts the hub")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", os.environ["TERNION_TEST_HUB"])
    return tmp_path


def downloaded(hub):
    """The names of the files in the cache."""
    return {path.name for path in pathlib.Path(hub).glob("hub/models--*/snapshots/*/**/*") if path.is_file()}


def test_a_tokenizer_needs_its_own_files_alone(hub, tiny, prompts):
    tokenizer = AutoTokenizer.from_pretrained("test/tiny")
    assert downloaded(hub) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    case = next(case for case in prompts.values() if "messages" in case)
    assert tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)["input_ids"] == case["input_ids"]
    own = AutoTokenizer.from_pretrained(tiny)
    for other in (
        ternion.Tokenizer.open("hf://test/tiny"),
        ternion.Tokenizer.open("hf://test/tiny@v1/model.safetensors"),
        AutoTokenizer.from_pretrained("test/tiny", revision="v1")._tokenizer,
    ):
        assert other.encode("a week") == own.encode("a week")
    assert "model.safetensors" not in downloaded(hub)


def test_a_tokenizer_within_a_gguf_file(hub, tiny):
    tokenizer = AutoTokenizer.from_pretrained("test/gguf", gguf_file="bitnet.gguf")
    assert downloaded(hub) == {"bitnet.gguf"}
    assert tokenizer.encode("a week") == AutoTokenizer.from_pretrained(tiny).encode("a week")


def test_a_model_is_used_offline_afterwards(hub, monkeypatch):
    llm = Llama.from_pretrained("test/gguf", "bitnet.gguf", n_ctx=256, verbose=False)
    assert llm.create_chat_completion(WEEK, temperature=0)["choices"][0]["message"]["content"] == SEVEN
    pipe = pipeline("text-generation", model="test/tiny")
    assert pipe(WEEK, max_new_tokens=20, do_sample=False)[0]["generated_text"][-1]["content"] == SEVEN
    # Which are in the repository beside the weights.
    assert AutoModelForCausalLM.from_pretrained("test/tiny")._defaults == pipe.model._defaults
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert ternion.load("hf://test/gguf/bitnet.gguf").generate(WEEK).text == SEVEN
    assert AutoTokenizer.from_pretrained("test/tiny").encode("a week")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        AutoTokenizer.from_pretrained("test/other")


def test_a_model_of_the_hub_is_converted(hub, tmp_path):
    out = tmp_path / "tiny.gguf"
    ternion.convert("hf://test/tiny", out, "gguf-i2s")
    assert ternion.load(out).generate(WEEK).text == SEVEN


def test_what_is_gated_or_missing_is_told(hub, monkeypatch):
    for open_it in (ternion.Tokenizer.open, ternion.load):
        with pytest.raises(ternion.Error, match="HF_TOKEN"):
            open_it("hf://test/gated")
        with pytest.raises(ternion.NotFoundError, match="no such repository"):
            open_it("hf://test/none")
    with pytest.raises(ternion.NotFoundError, match="no such repository"):
        ternion.convert("hf://test/none", hub / "out.gguf", "gguf-i2s")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    assert ternion.Tokenizer.open("hf://test/gated").encode("a week")


def test_the_configuration_of_generating_comes_along(hub, tiny, tmp_path, monkeypatch):
    local = AutoModelForCausalLM.from_pretrained(tiny)._defaults
    assert AutoModelForCausalLM.from_pretrained("test/tiny")._defaults == local
    # That of the current folder is nobody's.
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    monkeypatch.chdir(tmp_path)
    assert pipeline("text-generation", model=ternion.load(tiny)).model._defaults == {}
