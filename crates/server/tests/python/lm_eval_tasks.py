"""lm-evaluation-harness of PyPI, unchanged, with its own tasks over the data in a folder: argv[1] is the server, argv[2] the folder.

Prints what `local_tasks.summary` says of each document, and the scores.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
scratch = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = scratch.name
sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "eval" / "tests"))

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402

from local_tasks import summary, tasks  # noqa: E402

url, data, limit = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
# `local-completions` adds no special tokens unless it is told to, and none with a remote tokenizer. lm-eval's own models and
# `ternion eval` add those of the tokenizer.
options = {"model": "tiny", "tokenizer": str(data.parent), "tokenizer_backend": "huggingface", "add_bos_token": True}
options.update(max_retries=1, max_length=1023, num_concurrent=1)
model = LocalCompletionsAPI(base_url=url + "/v1/completions", batch_size=1, **options)
wanted = [path for name, path in tasks(data, pathlib.Path(scratch.name)) if name != "gsm8k_cot"]
results = simple_evaluate(model=model, tasks=wanted, limit=limit, log_samples=True, bootstrap_iters=100)
scores = {task: {k: v for k, v in found.items() if isinstance(v, float)} for task, found in results["results"].items()}
print(json.dumps({"items": summary(results["samples"]), "scores": scores}))
