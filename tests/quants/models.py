"""Writes a small random Llama in every type of quantised weights that candle and llama.cpp share into the folder that is named first, and
beside each the same values in F32. The second argument is a folder whose tokenizer they get."""

import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "embed"))
from bpe import add_tokenizer  # noqa: E402

OUT, TOKENIZER = Path(sys.argv[1]), Path(sys.argv[2])
HIDDEN, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 256, 4, 2, 512, 2, 128
SIZE = 512
rng = np.random.default_rng(11)

# Bytes of a block of 256 weights, where its scale and its minimum stand, and what the minimum is of the scale, so that the mean is 0.
K_QUANTS = {
    "Q2_K": (84, 80, 82, 1.5), "Q3_K": (110, 108, None, 0), "Q4_K": (144, 0, 2, 7.5), "Q5_K": (176, 0, 2, 15.5),
    "Q6_K": (210, 208, None, 0),
}


def quantised(kind, rows, columns, deviation):
    """Random weights of this deviation: their bytes, and their values in F32."""
    quantization = gguf.GGMLQuantizationType[kind]
    if kind not in K_QUANTS:
        data = gguf.quants.quantize((rng.standard_normal((rows, columns)) * deviation).astype(np.float32), quantization)
        return data, gguf.quants.dequantize(data, quantization)
    size, scale, minimum, ratio = K_QUANTS[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)

    def put(value):
        blocks[..., scale : scale + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        if minimum is not None:
            blocks[..., minimum : minimum + 2] = np.frombuffer(np.float16(value * ratio).tobytes(), np.uint8)
        return gguf.quants.dequantize(blocks.reshape(rows, -1), quantization)

    put(deviation / put(1 / 64).std() / 64)
    data = blocks.reshape(rows, -1)
    return data, gguf.quants.dequantize(data, quantization)


def writer(name):
    out = gguf.GGUFWriter(OUT / f"{name}.gguf", "llama")
    out.add_block_count(LAYERS)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(SIZE)
    add_tokenizer(out, TOKENIZER, SIZE)
    return out


def finish(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


OUT.mkdir(parents=True, exist_ok=True)
for kind in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS]:
    plain, small = writer(f"{kind}-f32"), writer(kind)
    shapes = {"token_embd.weight": (SIZE, HIDDEN, 0.5), "output.weight": (SIZE, HIDDEN, 0.1)}
    kv = KV_HEADS * HIDDEN // HEADS
    for layer in range(LAYERS):
        for part, rows, columns in [
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", kv, HIDDEN), ("attn_v", kv, HIDDEN), ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER),
        ]:
            shapes[f"blk.{layer}.{part}.weight"] = (rows, columns, 0.06)
    for name, (rows, columns, deviation) in shapes.items():
        data, values = quantised(kind, rows, columns, deviation)
        small.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        plain.add_tensor(name, values.astype(np.float32))
    for name in ["output_norm", *(f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ["attn_norm", "ffn_norm"])]:
        norm = (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)
        plain.add_tensor(f"{name}.weight", norm)
        small.add_tensor(f"{name}.weight", norm)
    finish(plain)
    finish(small)
