"""The first host's own examples: only the line of the import differs."""

import pathlib
import shutil

EXAMPLE = """\
from llama_cpp import Llama
llm = Llama(model_path="bitnet.gguf", n_ctx=4096)
output = llm.create_chat_completion(
    messages=[{"role": "user", "content": "How many days are in a week?"}],
)
print(output["choices"][0]["message"]["content"])
"""

CAUSAL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("BITNET")
model = AutoModelForCausalLM.from_pretrained("BITNET")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "How many days are in a week?"}], add_generation_prompt=True, return_tensors=None
)
output = model.generate([inputs["input_ids"]], max_new_tokens=30, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

PIPELINE = """\
from transformers import pipeline
generator = pipeline("text-generation", model="BITNET")
print(generator([{"role": "user", "content": "How many days are in a week?"}], do_sample=False)[0]["generated_text"][-1]["content"])
"""


def run(example: str, package: str, capsys) -> str:
    exec(example.replace(f"from {package} import", "from ternion import"), {})
    return capsys.readouterr().out


def test_llama_cpp(gguf, tmp_path, monkeypatch, capsys, recwarn):
    shutil.copy(gguf, tmp_path / "bitnet.gguf")
    monkeypatch.chdir(tmp_path)
    assert "seven days in a week" in run(EXAMPLE, "llama_cpp", capsys)
    # The small model was made for a context of 1024.
    assert "n_ctx=4096 is reduced" in str(recwarn.pop().message)


def test_transformers(tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(pathlib.Path(tiny), tmp_path / "BITNET")
    monkeypatch.chdir(tmp_path)
    assert "seven days in a week" in run(CAUSAL, "transformers", capsys)
    assert "seven days in a week" in run(PIPELINE, "transformers", capsys)
