"""Writes what lm-evaluation-harness makes of the data in `fixtures/eval`: prompts, log-likelihoods, answers, scores.

    pip install lm-eval==0.4.13 torch transformers accelerate
    python crates/eval/tests/golden.py CHECKPOINT DATA GOLDEN [--max-length N] [--limit N] [--chat] [--only TASK] [--double]

The files in `fixtures/eval` are of these runs, `dense` being made by `make_dense.py` beside it:

    golden.py fixtures/eval/dense fixtures/eval fixtures/eval/golden.json
    golden.py fixtures/eval/dense fixtures/eval fixtures/eval/golden-windows.json --only text --max-length 63
    golden.py fixtures/eval/dense fixtures/eval fixtures/eval/golden-chat.json --only mmlu_a --chat
    golden.py fixtures/tiny-packed fixtures/eval fixtures/eval/golden-ternary.json --only mmlu
    golden.py fixtures/tiny-packed fixtures/eval fixtures/eval/golden-ternary-double.json --only mmlu --double

CHECKPOINT is a folder that transformers can load, DATA a folder with `gsm8k/{train,test}.jsonl`, `mmlu/{dev,test}/*.csv` and
`text/*.txt` (what is missing is left out), or with `gsm8k.jsonl` and `gsm8k_train.jsonl`, GOLDEN the file to write. With a
folder `gsm8k` the data sets are written as parquet files as well, as `datasets` would. It is lm-eval's own code that builds the prompts, runs the model and scores it: only the place
of the data differs from its own tasks. The tests read GOLDEN; they need neither Python nor this script.
"""

import argparse
import itertools
import json
import os
import pathlib
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # eager

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from local_tasks import averages, summary, tasks
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("golden", type=pathlib.Path)
    parser.add_argument("--max-length", type=int, default=2047)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--only", help="tasks whose names begin with this")
    args = parser.parse_args()

    # In one precision: the packed format's loader makes its weights bfloat16 whatever it is asked for.
    network = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="float32", attn_implementation="eager")
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.double() if args.double else tensor.data.float()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=1, max_length=args.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        found = tasks(args.data, pathlib.Path(scratch))
        wanted = [path for name, path in found if name.startswith(args.only or "")]
        results = simple_evaluate(
            model=model, tasks=wanted, limit=args.limit, log_samples=True, bootstrap_iters=1000,
            apply_chat_template=args.chat, fewshot_as_multiturn=args.chat,
        )
    golden = {"checkpoint": args.checkpoint.name, "max_length": args.max_length, "chat": args.chat, "tasks": {}}
    for task, items in summary(results["samples"]).items():
        scores = {k: v for k, v in results["results"][task].items() if isinstance(v, float)}
        golden["tasks"][task] = {"scores": scores, "items": items}
    subjects = [golden["tasks"][t] for t in sorted(golden["tasks"]) if t.startswith("mmlu_")]
    if subjects:
        golden["mmlu"] = averages(subjects)
    args.golden.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


main()
