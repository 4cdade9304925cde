"""Turns the products of the decoder in the folder that is named first into MatMulNBits, 4 bits with a scale and a zero point for each 32
weights, as onnxruntime's tools do; writes it into the second folder, and prints the logits that onnxruntime computes with it for the
token ids of its golden.json."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

source, out = Path(sys.argv[1]), Path(sys.argv[2])
golden = json.loads((source / "golden.json").read_text())
model = onnx.load(source / "model.onnx")
BLOCK = 32


def quantised(name, weight):
    """The tensors for a weight [K, N]: codes, scales and zero points, column by column."""
    rows, columns = weight.shape
    blocks = weight.T.reshape(columns, rows // BLOCK, BLOCK)
    low, high = blocks.min(-1).clip(max=0), blocks.max(-1).clip(min=0)
    scale = np.maximum((high - low) / 15, 1e-8).astype(np.float32)
    zero = np.clip(np.round(-low / scale), 0, 15).astype(np.uint8)
    codes = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], 0, 15).astype(np.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    zero = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    zeros = zero[:, 0::2] | zero[:, 1::2] << 4
    tensors = {"codes": packed, "scales": scale.reshape(-1), "zeros": zeros.reshape(-1)}
    return [numpy_helper.from_array(np.ascontiguousarray(tensor), f"{name}.{kind}") for kind, tensor in tensors.items()]


weights = {tensor.name: tensor for tensor in model.graph.initializer}
count = 0
for node in model.graph.node:
    tensor = weights.get(node.input[1]) if node.op_type == "MatMul" else None
    if tensor is None:
        continue
    weight = numpy_helper.to_array(tensor)
    new = quantised(tensor.name, weight)
    model.graph.initializer.extend(new)
    model.graph.initializer.remove(tensor)
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    node.input[1:] = [tensor.name for tensor in new]
    rows, columns = weight.shape
    node.attribute.extend(helper.make_attribute(k, v) for k, v in {"K": rows, "N": columns, "bits": 4, "block_size": BLOCK}.items())
    count += 1
assert count >= 8, count
if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
onnx.save(model, out / "model.onnx")
for name in ["config.json", "tokenizer.json", "tokenizer_config.json"]:
    (out / name).write_bytes((source / name).read_bytes())

session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
ids = np.array([golden["input_ids"]])
config = json.loads((source / "config.json").read_text())
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
for put in session.get_inputs():
    if put.name.startswith("past_key_values"):
        width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        feed[put.name] = np.zeros((1, config["num_key_value_heads"], 0, width), np.float32)
    elif put.name == "position_ids":
        feed[put.name] = np.arange(ids.shape[1])[None]
print(json.dumps(session.run(["logits"], feed)[0][0].astype(float).tolist()))
