"""The tokenizer of a `tokenizer.json` with byte-level BPE, as metadata of a GGUF file."""

import json

import gguf


def add_tokenizer(writer, folder, size, pre="llama-bpe"):
    """Adds it, filled up to `size` tokens, with a name of the rule by which it splits texts, if there is one."""
    facts = json.loads((folder / "tokenizer.json").read_text())
    tokens = {i: (text, gguf.TokenType.NORMAL) for text, i in facts["model"]["vocab"].items()}
    for token in facts["added_tokens"]:
        tokens[token["id"]] = (token["content"], gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    tokens = [tokens.get(i, (f"[unused{i}]", gguf.TokenType.UNUSED)) for i in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in facts["model"]["merges"]]
    texts = [text for text, _ in tokens]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges(merges)
    bos, eos = (texts.index(text) for text in ["<|begin_of_text|>", "<|end_of_text|>"])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(True)
