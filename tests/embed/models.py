"""Writes small random models for embeddings, and decoders with kinds of tokenizers of llama.cpp's own, into the folder that is named
first. The second folder is the dense Qwen3 of the fixtures, whose weights become a model for embeddings."""

import json
import re
import shutil
import struct
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

from bpe import add_tokenizer

OUT, QWEN3 = Path(sys.argv[1]), Path(sys.argv[2])
rng = np.random.default_rng(7)


def weights(*shape, scale=0.15):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def near_one(width):
    return (1 + 0.2 * rng.standard_normal(width)).astype(np.float32)


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, tensor in tensors.items():
        blob = np.ascontiguousarray(tensor, dtype=np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    blob = path.read_bytes()
    length = struct.unpack("<Q", blob[:8])[0]
    header, data = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


def modules(folder, mode, normalize=True):
    names = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    paths = ["", "1_Pooling", "2_Normalize"]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths))
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))


# BERT, as a folder of sentence-transformers and as the GGUF file of the same weights.

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox jump ##s over lazy dog one two three , . ? ! ' na ##ive token hello world"
).split()
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789")
WORDS += LETTERS + ["##" + letter for letter in LETTERS] + ["-", "é", "日", "本"]
WORDS = list(dict.fromkeys(WORDS))
HIDDEN, HEADS, INNER, LAYERS, CONTEXT = 32, 4, 64, 2, 64


def bert():
    folder = OUT / "bert"
    folder.mkdir(parents=True)
    size = len(WORDS)
    tensors = {
        "embeddings.word_embeddings.weight": weights(size, HIDDEN, scale=0.5),
        "embeddings.position_embeddings.weight": weights(CONTEXT, HIDDEN, scale=0.5),
        "embeddings.token_type_embeddings.weight": weights(2, HIDDEN, scale=0.5),
        "embeddings.LayerNorm.weight": near_one(HIDDEN),
        "embeddings.LayerNorm.bias": weights(HIDDEN),
    }
    names = {
        "attention.self.query": (HIDDEN, HIDDEN, "attn_q"),
        "attention.self.key": (HIDDEN, HIDDEN, "attn_k"),
        "attention.self.value": (HIDDEN, HIDDEN, "attn_v"),
        "attention.output.dense": (HIDDEN, HIDDEN, "attn_output"),
        "intermediate.dense": (INNER, HIDDEN, "ffn_up"),
        "output.dense": (HIDDEN, INNER, "ffn_down"),
        "attention.output.LayerNorm": (HIDDEN, 0, "attn_output_norm"),
        "output.LayerNorm": (HIDDEN, 0, "layer_output_norm"),
    }
    places = {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
    }
    for layer in range(LAYERS):
        for name, (rows, cols, place) in names.items():
            for part in ["weight", "bias"]:
                own = f"encoder.layer.{layer}.{name}.{part}"
                places[own] = f"blk.{layer}.{place}.{part}"
                if part == "bias":
                    tensors[own] = weights(rows)
                else:
                    tensors[own] = weights(rows, cols, scale=0.3) if cols else near_one(rows)
    # Not used by embeddings, and there in most files.
    pooler = {"pooler.dense.weight": weights(HIDDEN, HIDDEN), "pooler.dense.bias": weights(HIDDEN)}
    write_safetensors(folder / "model.safetensors", tensors | pooler)
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": size, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER, "hidden_act": "gelu",
        "max_position_embeddings": CONTEXT, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "matryoshka_dimensions": [8, 16],
    }
    (folder / "config.json").write_text(json.dumps(config))
    modules(folder, "mean_tokens")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    special = [
        {"id": i, "content": WORDS[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i in range(5)
    ]
    around = lambda name, kind: {"SpecialToken": {"id": name, "type_id": kind}}
    text = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}
    tokenizer = {
        "version": "1.0", "truncation": {"max_length": 48, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None, "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [around("[CLS]", 0), text("A", 0), around("[SEP]", 0)],
            "pair": [around("[CLS]", 0), text("A", 0), around("[SEP]", 0), text("B", 1), around("[SEP]", 1)],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in [(2, "[CLS]"), (3, "[SEP]")]},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(WORDS)},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    ranks = OUT / "reranker"
    shutil.copytree(folder, ranks)
    (ranks / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    projected(folder)
    bert_gguf("bert", gguf.PoolingType.MEAN, tensors, places)
    bert_gguf("reranker", gguf.PoolingType.RANK, tensors | {"classifier": weights(1, HIDDEN)}, places | {"classifier": "cls.output.weight"})


def projected(bert):
    """The same with two modules Dense, and their weights as JSON."""
    folder = OUT / "projected"
    shutil.copytree(bert, folder)
    entries = json.loads((folder / "modules.json").read_text())
    layers = [(48, HIDDEN, "torch.nn.modules.activation.Tanh", True), (24, 48, "torch.nn.modules.linear.Identity", False)]
    shown = []
    for i, (rows, cols, activation, bias) in enumerate(layers):
        path = f"{2 + i}_Dense"
        (folder / path).mkdir()
        tensors = {"linear.weight": weights(rows, cols, scale=0.4)} | ({"linear.bias": weights(rows)} if bias else {})
        write_safetensors(folder / path / "model.safetensors", tensors)
        facts = {"in_features": cols, "out_features": rows, "bias": bias, "activation_function": activation}
        (folder / path / "config.json").write_text(json.dumps(facts))
        entries.insert(2 + i, {"idx": 0, "name": "", "path": path, "type": "sentence_transformers.models.Dense"})
        shown.append({name: tensor.tolist() for name, tensor in tensors.items()})
    entries[-1]["path"] = "4_Normalize"
    (folder / "modules.json").write_text(json.dumps([entry | {"idx": i, "name": str(i)} for i, entry in enumerate(entries)]))
    (folder / "dense.json").write_text(json.dumps(shown))


def bert_gguf(name, pooling, tensors, places):
    size = len(WORDS)
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", "bert")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    # In llama.cpp's form: a word begins with a mark, and what continues one has none.
    phantom = lambda word: word if word[0] == "[" and len(word) > 1 else (word[2:] if word.startswith("##") else "\u2581" + word)
    writer.add_token_list([phantom(word) for word in WORDS])
    kind = lambda i: gguf.TokenType.UNKNOWN if i == 1 else gguf.TokenType.CONTROL if i < 5 else gguf.TokenType.NORMAL
    writer.add_token_types([kind(i) for i in range(size)])
    for add, i in [
        (writer.add_pad_token_id, 0), (writer.add_unk_token_id, 1), (writer.add_sep_token_id, 3),
        (writer.add_mask_token_id, 4), (writer.add_bos_token_id, 2),
    ]:
        add(i)
    for own, place in places.items():
        writer.add_tensor(place, tensors[own])
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Qwen3 of the fixtures: the last token's state, of the length 1.

QWEN_PLACES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def place(name):
    if name == "embed_tokens.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{QWEN_PLACES[rest.removesuffix('.weight')]}.weight"


def qwen3():
    folder = OUT / "qwen3"
    folder.mkdir()
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
        shutil.copy(QWEN3 / name, folder / name)
    # Models for embeddings are saved without a head, and without `model.` before the names.
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_safetensors(QWEN3 / "model.safetensors").items()}
    tensors.pop("lm_head.weight", None)
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((QWEN3 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3Model"], "tie_word_embeddings": False}))
    modules(folder, "lasttoken")

    source = gguf.GGUFReader(QWEN3 / "q8_0.gguf")
    writer = gguf.GGUFWriter(OUT / "qwen3.gguf", "qwen3")
    for field in source.fields.values():
        if field.name.startswith(("GGUF.", "tokenizer.")) or field.name in ["general.architecture", "general.file_type"]:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    writer.add_pooling_type(gguf.PoolingType.LAST)
    add_tokenizer(writer, QWEN3, config["vocab_size"])
    for name, tensor in tensors.items():
        writer.add_tensor(place(name), tensor)
    finish(writer)


# A ternary Qwen3 as Microsoft's BitNet-embedding lies in its files: float masters, and a norm before each projection. The expected
# vectors are computed here in double precision: weights become round(w / mean|w|) times that mean, activations 8 bits for each token.


def rms_norm(x, weight, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)


def bit_linear(x, weight, norm):
    x = rms_norm(x, norm)
    scale = 127 / np.clip(np.abs(x).max(-1, keepdims=True), 1e-5, None)
    x = np.clip(np.round(x * scale), -128, 127) / scale
    mean = np.clip(np.abs(weight.astype(np.float64)).mean(), 1e-5, None)
    return x @ (np.clip(np.round(weight / mean), -1, 1) * mean).T


def bitnet_embedding():
    folder = OUT / "bitnet-embedding"
    shutil.copytree(OUT / "qwen3", folder)
    # Wide enough for rows of I2_S and TQ2_0.
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512}
    config = json.loads((folder / "config.json").read_text()) | sizes
    (folder / "config.json").write_text(json.dumps(config))
    widths = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256), "gate_proj": (512, 256)}
    widths |= {"up_proj": (512, 256), "down_proj": (256, 512), "q_norm": (64,), "k_norm": (64,)}
    tensors = {}
    for name, old in read_safetensors(folder / "model.safetensors").items():
        shape = widths.get(name.split(".")[-2], (*old.shape[:-1], 256))
        tensors[name] = near_one(*shape) if len(shape) == 1 else weights(*shape)
    linear = [name for name in tensors if name.endswith("_proj.weight")]
    for name in linear:
        width = tensors[name].shape[1]
        tensors[name.replace("_proj.weight", "_proj.norm.weight")] = near_one(width)
    write_safetensors(folder / "model.safetensors", tensors)
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]

    def project(name, x):
        return bit_linear(x, tensors[f"{name}.weight"], tensors[f"{name}.norm.weight"])

    def vector(ids):
        x = tensors["embed_tokens.weight"].astype(np.float64)[ids]
        count = len(ids)
        angles = np.arange(count)[:, None] / 10000 ** (np.arange(0, width, 2) / width)[None]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def rotate(t):
            a, b = t[..., : width // 2], t[..., width // 2 :]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        for layer in range(config["num_hidden_layers"]):
            at = f"layers.{layer}"
            h = rms_norm(x, tensors[f"{at}.input_layernorm.weight"])
            q = project(f"{at}.self_attn.q_proj", h).reshape(count, heads, width)
            k = project(f"{at}.self_attn.k_proj", h).reshape(count, kv_heads, width)
            v = project(f"{at}.self_attn.v_proj", h).reshape(count, kv_heads, width)
            q = rotate(rms_norm(q, tensors[f"{at}.self_attn.q_norm.weight"]))
            k = rotate(rms_norm(k, tensors[f"{at}.self_attn.k_norm.weight"]))
            k, v = (np.repeat(t, heads // kv_heads, 1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width)
            scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            x = x + project(f"{at}.self_attn.o_proj", np.einsum("hqk,khd->qhd", scores, v).reshape(count, -1))
            h = rms_norm(x, tensors[f"{at}.post_attention_layernorm.weight"])
            gate, up = project(f"{at}.mlp.gate_proj", h), project(f"{at}.mlp.up_proj", h)
            x = x + project(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        last = rms_norm(x, tensors["norm.weight"])[-1]
        return (last / np.linalg.norm(last)).tolist()

    inputs = [[5, 6, 7], [300], [i * 7 % 496 for i in range(30)]]
    (folder / "expected.json").write_text(json.dumps([vector(ids) for ids in inputs]))


# Decoders whose tokenizers are llama.cpp's own.


def decoder(name, vocabulary):
    """A random Llama of one layer with this vocabulary: a function that adds it to a writer and returns its size."""
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    size = vocabulary(writer)
    writer.add_vocab_size(size)
    for tensor, shape in {
        "token_embd.weight": (size, HIDDEN), "output.weight": (size, HIDDEN), "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN, HIDDEN), "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN), "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN), "blk.0.ffn_down.weight": (HIDDEN, INNER),
    }.items():
        writer.add_tensor(tensor, weights(*shape))
    for tensor in ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]:
        writer.add_tensor(tensor, near_one(HIDDEN))
    finish(writer)


PIECES = "▁the ▁quick ▁brown ▁fox ▁ th e qu ick br own o x s ing er ▁a ▁i n d t h l w r c k m p u y z g f b v j q a i hello ▁hello world ▁world é 日本".split()
PIECES = list(dict.fromkeys(PIECES))
PIECES += [chr(c) for c in range(0x21, 0x7F) if chr(c) not in PIECES]


def unigram(writer):
    tokens = ["<pad>", "</s>", "<unk>"] + PIECES + [f"<0x{byte:02X}>" for byte in range(256)] + ["<extra_0>", "<|user|>"]
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * len(PIECES)
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    scores = [0.0, 0.0, 0.0] + [-2.0 - 0.05 * i - (2 if len(piece) == 1 else 0) for i, piece in enumerate(PIECES)] + [0.0] * 258
    writer.add_tokenizer_model("t5")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}")
    return len(tokens)


CHARSMAP = (QWEN3.parent.parent / "gguf-tokenizers/charsmap.bin").read_bytes()


def with_charsmap(charsmap):
    """Unigram that replaces parts of a text, as SentencePiece does."""

    def vocabulary(writer):
        writer.add_precompiled_charsmap(charsmap)
        return unigram(writer)

    return vocabulary


def rwkv(writer):
    def escaped(data):
        return "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in data)

    words = [bytes([b]) for b in range(256)] + [w.encode() for w in ["the", " the", "quick", " quick", "日", "日本", "hello", "world", "  ", "\n\n"]]
    tokens = ["<s>"] + [escaped(word) for word in words]
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    return len(tokens)


def wordpiece(writer):
    writer.add_tokenizer_model("bert")
    phantom = lambda word: word if word[0] == "[" and len(word) > 1 else (word[2:] if word.startswith("##") else "\u2581" + word)
    writer.add_token_list([phantom(word) for word in WORDS])
    kind = lambda i: gguf.TokenType.UNKNOWN if i == 1 else gguf.TokenType.CONTROL if i < 5 else gguf.TokenType.NORMAL
    writer.add_token_types([kind(i) for i in range(len(WORDS))])
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)
    return len(WORDS)


def byte_level(pre):
    """The tokenizer of the fixtures, as a file that names another rule, or none."""

    def vocabulary(writer):
        add_tokenizer(writer, QWEN3, 512, pre)
        return 512

    return vocabulary


def learned(count):
    """Merges as BPE learns them from this file, and the tokens that they make, over characters with a mark for a space."""
    lines = [list(line) for line in re.findall("[^\n]+", Path(__file__).read_text().replace(" ", "\u2581"))]
    tokens, merges = sorted({c for line in lines for c in line}), []
    for _ in range(count):
        pairs = Counter(pair for line in lines for pair in zip(line, line[1:]))
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        merges.append(f"{a} {b}")
        if a + b not in tokens:
            tokens.append(a + b)
        for line in lines:
            i = 0
            while i + 1 < len(line):
                if (line[i], line[i + 1]) == (a, b):
                    line[i : i + 2] = [a + b]
                i += 1
    return tokens, merges


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gemma4(writer):
    pieces, merges = learned(150)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
    tokens = special + BYTES + ["\n", "\n\n", "\n\n\n"] + pieces
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (3 + len(pieces))
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    return len(tokens)


def plamo2(writer):
    special = ["<|plamo:unk|>", "<|plamo:bos|>", "<|plamo:eos|>", "<|plamo:pad|>"]
    pieces = [piece.replace("\u2581", " ") for piece in learned(150)[0]] + ["日本", "語", "の", "テキスト", "テキ", "\n", "\n\n", "é"]
    pieces = list(dict.fromkeys(pieces))
    tokens = special + BYTES + pieces
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.BYTE] * 256
    writer.add_tokenizer_model("plamo2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(pieces))
    writer.add_token_scores([0.0] * 260 + [-3.0 - 0.03 * i - 4.0 / len(piece) for i, piece in enumerate(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(True)
    return len(tokens)


OUT.mkdir(parents=True, exist_ok=True)
bert()
qwen3()
bitnet_embedding()
decoder("unigram", unigram)
decoder("charsmap", with_charsmap(CHARSMAP))
decoder("damaged-charsmap", with_charsmap(CHARSMAP[:-1] + b"x"))
decoder("rwkv", rwkv)
decoder("wordpiece", wordpiece)
decoder("bpe-missing", byte_level(None))
decoder("bpe-default", byte_level("default"))
decoder("bpe-unknown", byte_level("no-such-rule"))
decoder("gemma4", gemma4)
decoder("plamo2", plamo2)
