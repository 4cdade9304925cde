"""Checks an exported model with the tools of ONNX and computes its logits, for a test to compare.

usage: portable.py FOLDER IDS.json LOGITS.bin
The ids are computed as one prompt and, but for the first, token by token; both must agree.
"""

import json
import sys

import numpy as np
import onnx
import onnxruntime


def run(session, ids, past):
    known = next(iter(past.values())).shape[2]
    feed = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, known + len(ids)), np.int64),
        "position_ids": np.arange(known, known + len(ids), dtype=np.int64)[None],
    }
    names = [output.name for output in session.get_outputs()]
    out = dict(zip(names, session.run(None, {**feed, **past})))
    present = {name: out[name.replace("past_key_values", "present")] for name in past}
    return out["logits"][0], present


def main():
    folder, ids, target = sys.argv[1:]
    path = folder + "/model.onnx"
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    with open(ids) as file:
        ids = json.load(file)
    empty = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }
    logits, _ = run(session, ids, empty)
    past, rows = empty, []
    for token in ids:
        row, past = run(session, [token], past)
        rows.append(row)
    difference = np.abs(np.concatenate(rows) - logits).max()
    assert difference < 1e-4, f"token by token, the logits differ by {difference}"
    logits.astype("<f4").tofile(target)
    print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)


if __name__ == "__main__":
    main()
