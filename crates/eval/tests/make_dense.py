"""Writes `fixtures/eval/dense`: a random Llama without ternary weights, with the tokenizer of `fixtures/tiny-packed`.

    pip install torch transformers && python crates/eval/tests/make_dense.py

A ternary model rounds its activations to int8, and where one lies near a tie two right implementations differ. Here nothing
is rounded, so that log-likelihoods agree to the precision of float32.
"""

import pathlib
import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURES = pathlib.Path(__file__).parents[3] / "fixtures"
OUT = FIXTURES / "eval" / "dense"

torch.manual_seed(8)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
    max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=496, eos_token_id=497,
    initializer_range=0.15,
)
LlamaForCausalLM(config).to(torch.float16).save_pretrained(OUT)
for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    shutil.copy(FIXTURES / "tiny-packed" / name, OUT / name)
