"""Models whose weights are not ternary."""

import json

import pytest

import ternion
from conftest import FIXTURES


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_greedy_answers_are_those_of_transformers(family):
    folder = FIXTURES / "dense" / family
    golden = json.loads((folder / "golden.json").read_text())
    model = ternion.load(folder)
    answer = model.generate(golden["input_ids"], max_tokens=len(golden["greedy"]), temperature=0, ignore_eos=True)
    assert answer.tokens == golden["greedy"]
    causal = ternion.AutoModelForCausalLM.from_pretrained(folder)
    count = len(golden["greedy"])
    output = causal.generate([golden["input_ids"]], max_new_tokens=count, eos_token_id=[], do_sample=False)
    assert output == [golden["input_ids"] + golden["greedy"]]


def test_a_quantised_file_in_llama():
    llm = ternion.Llama(FIXTURES / "dense" / "qwen2" / "q8_0.gguf", n_ctx=0, verbose=False)
    reply = llm("a week", max_tokens=4, temperature=0)
    assert reply["usage"]["completion_tokens"] == 4
