"""``Llama``: the calls and results of llama-cpp-python."""

import inspect
import json
import warnings

import pytest

import ternion
from ternion import Llama

WEEK = [{"role": "user", "content": "How many days are in a week?"}]
PROMPT = "Question: What is 1 + 1?\nAnswer:"


def test_a_completion_has_the_form_of_llama_cpp(llm, gguf):
    reply = llm(PROMPT, max_tokens=8, temperature=0)
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion"
    assert reply["model"] == gguf and isinstance(reply["created"], int)
    (choice,) = reply["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert choice["text"] and choice["index"] == 0 and choice["logprobs"] is None and choice["finish_reason"] == "length"
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(llm.tokenize(PROMPT.encode(), special=True))
    assert (usage["completion_tokens"], usage["total_tokens"]) == (8, usage["prompt_tokens"] + 8)


def test_a_stream_of_chunks_is_the_completion(llm):
    whole = llm.create_completion(PROMPT, max_tokens=20, temperature=0)
    chunks = list(llm.create_completion(PROMPT, max_tokens=20, temperature=0, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and "usage" not in chunks[0]


def test_stop_and_echo(llm):
    reply = llm(PROMPT, max_tokens=20, temperature=0, stop=["\n"], echo=True)
    choice = reply["choices"][0]
    assert choice["text"].startswith(PROMPT) and "\n" not in choice["text"][len(PROMPT) :]
    assert choice["finish_reason"] == "stop"


def test_a_prompt_of_tokens(llm):
    tokens = llm.tokenize(PROMPT.encode(), special=True)
    texts = [llm(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] for prompt in (PROMPT, tokens)]
    assert texts[0] == texts[1]


def test_log_probabilities_of_a_completion(llm):
    reply = llm(PROMPT, max_tokens=6, temperature=0, logprobs=3)
    choice = reply["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"][0] == len(PROMPT)
    for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        assert top[token] == logprob == max(top.values()) and 3 <= len(top) <= 4

    echoed = llm(PROMPT, max_tokens=6, temperature=0, logprobs=3, echo=True)["choices"][0]
    assert echoed["text"] == PROMPT + choice["text"]
    assert "".join(echoed["logprobs"]["tokens"]) == echoed["text"]
    assert echoed["logprobs"]["token_logprobs"][-6:] == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
    assert echoed["logprobs"]["text_offset"][0] == 0

    chunks = list(llm(PROMPT, max_tokens=6, temperature=0, logprobs=3, stream=True))
    tokens = [token for chunk in chunks if chunk["choices"][0]["logprobs"] for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert tokens == logprobs["tokens"]


def test_a_chat_has_the_form_of_llama_cpp(llm):
    reply = llm.create_chat_completion(WEEK, temperature=0)
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "There are seven days in a week."}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    # The token that ends the answer does not count.
    assert reply["usage"]["completion_tokens"] == len(llm.tokenize(b"There are seven days in a week.", add_bos=False))


def test_a_chat_in_chunks(llm):
    chunks = list(llm.create_chat_completion(WEEK, temperature=0, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "There are seven days in a week."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_log_probabilities_of_a_chat(llm):
    reply = llm.create_chat_completion(WEEK, temperature=0, logprobs=True, top_logprobs=2)
    choice = reply["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def test_results_are_those_of_the_package_openai(llm):
    pytest.importorskip("openai")
    reply = llm.create_chat_completion_openai_v1(WEEK, temperature=0, logprobs=True, top_logprobs=2)
    assert reply.choices[0].message.content == "There are seven days in a week."
    chunks = list(llm.create_chat_completion_openai_v1(WEEK, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "There are seven days in a week."


def test_seeds(gguf):
    def answers(seed):
        llm = Llama(gguf, seed=seed, verbose=False)
        return [llm(PROMPT, max_tokens=12, temperature=2.0, min_p=0.0, top_k=0)["choices"][0]["text"] for _ in range(2)]

    first, second = answers(5)
    assert [first, second] == answers(5) and first != second
    llm = Llama(gguf, verbose=False)
    texts = {llm(PROMPT, max_tokens=12, temperature=2.0, seed=3)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1


def test_tokens_and_text(llm):
    text = "naïve 🦀 in a week"
    tokens = llm.tokenize(text.encode())
    assert tokens[0] == llm.token_bos() and llm.tokenize(text.encode(), add_bos=False) == tokens[1:]
    assert llm.detokenize(tokens) == text.encode()
    # A character may lie across tokens.
    parts = [llm.detokenize([token], prev_tokens=tokens[:at]) for at, token in enumerate(tokens)]
    assert b"".join(parts) == text.encode()
    assert llm.detokenize([llm.token_eos()]) == b"" and llm.detokenize([llm.token_eos()], special=True) != b""
    marked = llm.detokenize([llm.token_eos()], special=True)
    assert llm.tokenize(marked, add_bos=False, special=True) == [llm.token_eos()]
    assert llm.token_eos() not in llm.tokenize(marked, add_bos=False)


def test_facts(llm):
    assert llm.n_ctx() == 1024 and llm.n_vocab() == 1280
    llm.reset()


def test_a_context_beyond_the_models_is_reduced(gguf):
    with pytest.warns(UserWarning, match="made for a context of 1024 tokens; n_ctx=4096 is reduced"):
        assert Llama(gguf, n_ctx=4096, verbose=False).n_ctx() == 1024
    assert Llama(gguf, n_ctx=0, verbose=False).n_ctx() == 1024
    assert Llama(gguf, verbose=False).n_ctx() == 512


def test_verbose_says_what_is_loaded(gguf, capsys):
    Llama(gguf)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "context 512" in printed.err
    Llama(gguf, verbose=False)
    assert capsys.readouterr().err == ""


def test_what_has_no_meaning_warns_once(gguf):
    with pytest.warns(UserWarning, match="n_gpu_layers=-1 has no meaning here"):
        Llama(gguf, n_gpu_layers=-1, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Llama(gguf, n_gpu_layers=-1, verbose=False)


@pytest.mark.parametrize(
    "argument",
    [{"lora_path": "x"}, {"chat_format": "llama-2"}, {"rope_freq_base": 1e6}, {"embedding": True}, {"type_k": 8, "type_v": 8}],
)
def test_what_would_change_answers_is_refused(gguf, argument):
    with pytest.raises(ternion.UnsupportedError, match=next(iter(argument))):
        Llama(gguf, verbose=False, **argument)


@pytest.mark.parametrize("argument", [{"mirostat_mode": 2}, {"typical_p": 0.5}, {"grammar": object()}, {"logits_processor": []}])
def test_sampling_that_is_not_there_is_refused(llm, argument):
    name = next(iter(argument))
    with pytest.raises(NotImplementedError, match=name):
        llm(PROMPT, **argument)
    with pytest.raises(ternion.UnsupportedError, match=name):
        llm.create_chat_completion(WEEK, **argument)


def test_other_names_are_type_errors(llm, gguf):
    with pytest.raises(TypeError):
        Llama(gguf, n_contexts=7)
    with pytest.raises(TypeError):
        llm(PROMPT, max_token=7)
    with pytest.raises(TypeError, match="takes bytes"):
        llm.tokenize("a week")
    with pytest.raises(ternion.NotFoundError):
        Llama("missing.gguf")
    with pytest.raises(ValueError, match="exceed|context"):
        llm([5] * 1024)


def test_a_closed_model_says_so(gguf):
    with Llama(gguf, verbose=False) as llm:
        pass
    with pytest.raises(ternion.ClosedError):
        llm(PROMPT)


def test_signatures_are_those_of_llama_cpp():
    """The names and the order of llama-cpp-python 0.3."""
    completion = (
        "prompt suffix max_tokens temperature top_p min_p typical_p logprobs echo stop frequency_penalty presence_penalty "
        "repeat_penalty top_k stream seed tfs_z mirostat_mode mirostat_tau mirostat_eta model stopping_criteria logits_processor "
        "grammar logit_bias"
    )
    chat = (
        "messages functions function_call tools tool_choice temperature top_p top_k min_p typical_p stream stop seed "
        "response_format max_tokens presence_penalty frequency_penalty repeat_penalty tfs_z mirostat_mode mirostat_tau "
        "mirostat_eta model logits_processor grammar logit_bias logprobs top_logprobs"
    )
    for method, names in [(Llama.create_completion, completion), (Llama.create_chat_completion, chat)]:
        assert list(inspect.signature(method).parameters)[1:] == names.split()


SCHEMA = {
    "type": "object",
    "properties": {"days": {"type": "integer"}, "unit": {"enum": ["day", "week"]}},
    "required": ["days", "unit"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "response_format",
    [{"type": "json_object", "schema": SCHEMA}, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}],
)
def test_a_response_format_holds(llm, response_format):
    jsonschema = pytest.importorskip("jsonschema")
    for seed in range(3):
        reply = llm.create_chat_completion(WEEK, response_format=response_format, max_tokens=200, temperature=1.5, seed=seed)
        assert reply["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(reply["choices"][0]["message"]["content"]), SCHEMA)


def test_a_response_format_that_is_not_known_is_refused(llm):
    with pytest.raises(ternion.UnsupportedError, match="xml"):
        llm.create_chat_completion(WEEK, response_format={"type": "xml"})
    with pytest.raises(ValueError, match="schema"):
        llm.create_chat_completion(WEEK, response_format={"type": "json_object", "schema": 7})


def test_a_grammar_from_a_schema_holds(llm):
    jsonschema = pytest.importorskip("jsonschema")
    grammar = ternion.LlamaGrammar.from_json_schema(json.dumps(SCHEMA))
    for reply in (llm(PROMPT, grammar=grammar, max_tokens=200), llm.create_chat_completion(WEEK, grammar=grammar)):
        choice = reply["choices"][0]
        jsonschema.validate(json.loads(choice["text"] if "text" in choice else choice["message"]["content"]), SCHEMA)
    with pytest.raises(ternion.UnsupportedError, match="GBNF"):
        ternion.LlamaGrammar.from_string("root ::= [a-z]+")


def test_models_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ternion.Error, match="owner/name"):
        Llama.from_pretrained("owner/name", "model.gguf", verbose=False)
    with pytest.raises(ternion.NotFoundError, match="HF_HUB_OFFLINE"):
        ternion.AutoTokenizer.from_pretrained("owner/name")
