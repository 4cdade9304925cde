"""``pipeline``, ``AutoModelForCausalLM`` and ``AutoTokenizer``: the calls and results of transformers."""

import pytest

import ternion
from ternion import AutoModelForCausalLM, AutoTokenizer, pipeline

WEEK = [{"role": "user", "content": "How many days are in a week?"}]


@pytest.fixture(scope="module")
def pipe(tiny):
    return pipeline("text-generation", model=tiny)


@pytest.fixture(scope="module")
def causal(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def test_generate_continues_as_transformers_does(packed, continuations):
    causal = AutoModelForCausalLM.from_pretrained(packed)
    for name, case in continuations.items():
        ids, expected = case["input_ids"], case["greedy_f32"]
        output = causal.generate([ids], max_new_tokens=len(expected), eos_token_id=[], do_sample=False)
        assert output == [ids + expected], name


def test_tokens_are_those_of_transformers(tokenizer, prompts):
    for case in prompts.values():
        if "messages" in case:
            ids = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)["input_ids"]
            text = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, tokenize=False)
            assert text == case["rendered"]
        else:
            ids = tokenizer(case["text"])["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == case["text"]
        assert ids == case["input_ids"]


def test_a_text_and_a_list_of_texts(pipe):
    (one,) = pipe("The sky is", max_new_tokens=5, do_sample=False)
    assert set(one) == {"generated_text"} and one["generated_text"].startswith("The sky is")
    several = pipe(["The sky is", "Once"], max_new_tokens=5, do_sample=False)
    assert several[0] == [one] and len(several) == 2
    (new,) = pipe("The sky is", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert "The sky is" + new["generated_text"] == one["generated_text"]


def test_a_chat_and_a_list_of_chats(pipe):
    (one,) = pipe(WEEK, do_sample=False)
    assert one["generated_text"] == [*WEEK, {"role": "assistant", "content": "There are seven days in a week."}]
    assert pipe([WEEK, WEEK], do_sample=False) == [[one], [one]]
    (new,) = pipe(WEEK, do_sample=False, return_full_text=False)
    assert new["generated_text"] == "There are seven days in a week."
    started = [*WEEK, {"role": "assistant", "content": "There are seven"}]
    (one,) = pipe(started, do_sample=False)
    assert one["generated_text"] == [*WEEK, {"role": "assistant", "content": "There are seven days in a week."}]


def test_several_answers_to_one_prompt(pipe):
    answers = pipe("Once", num_return_sequences=3, do_sample=True, temperature=2.0, seed=1, max_new_tokens=10)
    assert len(answers) == 3 and len({answer["generated_text"] for answer in answers}) > 1
    assert answers == pipe("Once", num_return_sequences=3, do_sample=True, temperature=2.0, seed=1, max_new_tokens=10)


def test_a_stop_string_is_in_the_text(pipe):
    (answer,) = pipe(WEEK, do_sample=False, stop_strings=" days", return_full_text=False)
    assert answer["generated_text"] == "There are seven days"


def test_token_ids_as_a_result(pipe, tokenizer):
    (answer,) = pipe("The sky is", max_new_tokens=5, do_sample=False, return_tensors=True)
    assert answer["generated_token_ids"][: len(tokenizer("The sky is").input_ids)] == tokenizer("The sky is").input_ids


def test_a_model_that_is_loaded(model, causal):
    expected = pipeline(model=causal)("Once", max_new_tokens=5, do_sample=False)
    assert pipeline(model=model)("Once", max_new_tokens=5, do_sample=False) == expected


def test_a_batch_with_padding(causal, tokenizer):
    texts = ["The sky is", "Question: What is 1 + 1?\nAnswer:"]
    batch = tokenizer(texts, padding=True)
    assert len({len(row) for row in batch.input_ids}) == 1 and batch.attention_mask[0][0] == 0
    outputs = causal.generate(**batch, max_new_tokens=5, do_sample=False)
    for text, row, output in zip(texts, batch.input_ids, outputs):
        alone = causal.generate([tokenizer(text).input_ids], max_new_tokens=5, do_sample=False)[0]
        assert output[len(row) :] == alone[len(tokenizer(text).input_ids) :]


def test_arrays_of_numpy(causal, tokenizer):
    numpy = pytest.importorskip("numpy")
    inputs = tokenizer("The sky is", return_tensors="np")
    output = causal.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert isinstance(output, numpy.ndarray) and output.shape == (1, inputs.input_ids.shape[1] + 5)
    assert tokenizer.batch_decode(output, skip_special_tokens=True)[0].startswith("The sky is")
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(["a", "a b c"], return_tensors="np")


def test_lengths(causal, tokenizer):
    ids = tokenizer("Once").input_ids
    assert len(causal.generate([ids], eos_token_id=[])[0]) == len(ids) + 20
    assert len(causal.generate([ids], eos_token_id=[], max_length=len(ids) + 3)[0]) == len(ids) + 3
    assert len(causal.generate([ids], eos_token_id=[], max_length=900, max_new_tokens=4)[0]) == len(ids) + 4


def test_a_generation_config(causal, tokenizer):
    ids = tokenizer("Once").input_ids
    config = {"max_new_tokens": 3, "do_sample": False}
    assert len(causal.generate([ids], eos_token_id=[], generation_config=config)[0]) == len(ids) + 3


@pytest.mark.parametrize("argument", [{"num_beams": 4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 5}, {"streamer": object()}])
def test_what_would_change_answers_is_refused(causal, pipe, argument):
    name = next(iter(argument))
    with pytest.raises(ternion.UnsupportedError, match=name):
        causal.generate([[1, 2]], **argument)
    with pytest.raises(NotImplementedError, match=name):
        pipe("Once", **argument)


def test_other_names_are_type_errors(causal, pipe, tiny):
    with pytest.raises(TypeError, match="max_new_token"):
        causal.generate([[1, 2]], max_new_token=5)
    with pytest.raises(TypeError, match="max_new_token"):
        pipe("Once", max_new_token=5)
    with pytest.raises(ternion.UnsupportedError, match="summarization"):
        pipeline("summarization", model=tiny)
    with pytest.raises(ternion.UnsupportedError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config=object())


def test_where_to_compute_warns(tiny):
    with pytest.warns(UserWarning, match="device_map='auto' has no meaning here"):
        AutoModelForCausalLM.from_pretrained(tiny, device_map="auto", torch_dtype=None, trust_remote_code=None)


def test_a_gguf_file_of_a_folder(gguf):
    folder, _, name = gguf.rpartition("/")
    causal = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    assert tokenizer.decode(causal.generate([tokenizer("Once").input_ids], max_new_tokens=2)[0], skip_special_tokens=True)


def test_the_tokenizer(tokenizer):
    assert tokenizer.decode(tokenizer.encode("naïve 🦀", add_special_tokens=False)) == "naïve 🦀"
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("days")) == tokenizer("days", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id) == tokenizer.bos_token
    assert tokenizer.eos_token and len(tokenizer) == tokenizer.vocab_size
