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
import csv
import itertools
import json
import os
import pathlib
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # eager

import lm_eval.tasks
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def mmlu_rows(folder, split):
    for path in sorted((folder / split).glob(f"*_{split}.csv")):
        subject = path.name.removesuffix(f"_{split}.csv")
        with path.open(encoding="utf-8", newline="") as file:
            for question, *choices, letter in csv.reader(file):
                yield {"question": question, "subject": subject, "choices": choices, "answer": "ABCD".index(letter)}


def write_mmlu_parquet(folder, out):
    """The layout of the data set `cais/mmlu`, configuration `all`."""
    schema = pa.schema([
        ("question", pa.string()), ("subject", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64()),
    ])
    (out / "all").mkdir(parents=True, exist_ok=True)
    for split in ("dev", "test"):
        table = pa.Table.from_pylist(list(mmlu_rows(folder, split)), schema=schema)
        pq.write_table(table, out / "all" / f"{split}-00000-of-00001.parquet")


def write_gsm8k_parquet(folder, out):
    """The layout of the data set `openai/gsm8k`, configuration `main`."""
    (out / "main").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        table = pa.Table.from_pylist([json.loads(line) for line in lines])
        pq.write_table(table, out / "main" / f"{split}-00000-of-00001.parquet")


def tasks(data, scratch):
    """lm-eval's own task files, included in files that take the data from local files."""
    own = pathlib.Path(lm_eval.tasks.__file__).parent

    def write(name, **config):
        path = scratch / f"{name}.yaml"
        path.write_text(json.dumps({"task": name, "dataset_name": None, **config}), encoding="utf-8")
        return name, str(path)

    gsm8k = data / "gsm8k"
    files = {}
    if gsm8k.is_dir():
        write_gsm8k_parquet(gsm8k, data / "gsm8k-parquet")
        files = {split: str(gsm8k / f"{split}.jsonl") for split in ("train", "test")}
    elif (data / "gsm8k.jsonl").is_file():
        files = {"train": str(data / "gsm8k_train.jsonl"), "test": str(data / "gsm8k.jsonl")}
    if files:
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        yield write("gsm8k", include=str(own / "gsm8k" / "gsm8k.yaml"), **local)
        yield write("gsm8k_cot", include=str(own / "gsm8k" / "gsm8k-cot.yaml"), **local)
    mmlu = data / "mmlu"
    if mmlu.is_dir():
        if gsm8k.is_dir():
            write_mmlu_parquet(mmlu, data / "mmlu-parquet")
        for subject in sorted({row["subject"] for row in mmlu_rows(mmlu, "test")}):
            files = {}
            for split in ("dev", "test"):
                rows = [row for row in mmlu_rows(mmlu, split) if row["subject"] == subject]
                files[split] = str(scratch / f"{subject}-{split}.parquet")
                pq.write_table(pa.Table.from_pylist(rows), files[split])
            # Subjects that lm-eval does not know get the description that its script would write for them.
            known = own / "mmlu" / "default" / f"mmlu_{subject}.yaml"
            include = str(known if known.exists() else known.with_name("_default_template_yaml"))
            about = subject.replace("_", " ")
            description = f"The following are multiple choice questions (with answers) about {about}.\n\n"
            yield write(
                f"mmlu_{subject}", include=include, num_fewshot=5, dataset_path="parquet",
                dataset_kwargs={"data_files": files}, **({} if known.exists() else {"description": description}),
            )
    text = sorted((data / "text").glob("*.txt"))
    if text:
        documents = scratch / "text.jsonl"
        lines = [json.dumps({"page": path.read_text(encoding="utf-8")}) + "\n" for path in text]
        documents.write_text("".join(lines), encoding="utf-8")
        yield write(
            "text", dataset_path="json", dataset_kwargs={"data_files": {"test": str(documents)}}, test_split="test",
            output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{page}}",
            metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        )


def averages(subjects):
    """The figures of the group, by lm-eval's own functions."""
    scores, errors = ([s["scores"][key] for s in subjects] for key in ("acc,none", "acc_stderr,none"))
    sizes = [len(s["items"]) for s in subjects]
    return {
        "acc": aggregate_subtask_metrics(scores, sizes),
        "acc_stderr": float(pooled_sample_stderr(errors, sizes)),
        "mean": aggregate_subtask_metrics(scores, sizes, weight_by_size=False),
        "mean_stderr": float(unweighted_mean_stderr(errors)),
    }


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
    for task, samples in sorted(results["samples"].items()):
        items = {}
        for sample in samples:
            item = items.setdefault(sample["doc_id"], {})
            arguments = list(sample["arguments"].values()) if isinstance(sample["arguments"], dict) else sample["arguments"]
            arguments = [list(a.values()) if isinstance(a, dict) else a for a in arguments]
            item["prompt"] = arguments[0][0]
            if task.startswith("gsm8k"):
                item["answer"] = sample["resps"][0][0]
                item.setdefault("filtered", {})[sample["filter"]] = sample["filtered_resps"][0]
                item.setdefault("exact_match", {})[sample["filter"]] = sample["exact_match"]
            elif task.startswith("mmlu"):
                item["continuations"] = [a[1] for a in arguments]
                item["loglikelihoods"] = [float(r[0][0]) for r in sample["resps"]]
                item["acc"] = sample["acc"]
            else:
                item["loglikelihood"] = float(sample["resps"][0][0])
        scores = {k: v for k, v in results["results"][task].items() if isinstance(v, float)}
        golden["tasks"][task] = {"scores": scores, "items": [items[i] for i in sorted(items)]}
    subjects = [golden["tasks"][t] for t in sorted(golden["tasks"]) if t.startswith("mmlu_")]
    if subjects:
        golden["mmlu"] = averages(subjects)
    args.golden.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


main()
