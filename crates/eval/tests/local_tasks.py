"""The tasks of lm-evaluation-harness with their data in local files, for `golden.py` and for the tests of the server."""

import csv
import json
import pathlib

import lm_eval.tasks
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr


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


def summary(samples):
    """What each task made of each of its documents, from the samples that lm-eval logs."""
    found = {}
    for task, logged in sorted(samples.items()):
        items = {}
        for sample in logged:
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
        found[task] = [items[i] for i in sorted(items)]
    return found
