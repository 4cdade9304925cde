"""lm-evaluation-harness of PyPI, unchanged, against the server at argv[1]: scores and generations of requests in a JSON file.

argv[2] names a file with {"pairs": [[context, continuation], ...], "prompts": [...]}. Prints what the harness makes of the answers.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402

url, path = sys.argv[1:3]
with open(path, encoding="utf-8") as file:
    given = json.load(file)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=tuple(each), idx=i) for i, each in enumerate(arguments)]


options = {"model": "tiny", "max_retries": 1, "max_length": 255, "tokenizer_backend": "remote", "num_concurrent": 1}
completions = LocalCompletionsAPI(base_url=url + "/v1/completions", batch_size=2, **options)
scores = completions.loglikelihood(instances("loglikelihood", given["pairs"]), disable_tqdm=True)
until = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
texts = completions.generate_until(instances("generate_until", [(prompt, until) for prompt in given["prompts"]]), disable_tqdm=True)

chat_options = {"model": "tiny", "max_retries": 1, "num_concurrent": 1, "tokenizer_backend": None, "tokenized_requests": False}
chat = LocalChatCompletion(base_url=url + "/v1/chat/completions", **chat_options)
question = chat.apply_chat_template([{"role": "user", "content": "How many days are in a week?"}])
answers = chat.generate_until(instances("generate_until", [(question, until)]), disable_tqdm=True)
print(json.dumps({"scores": scores, "texts": texts, "answers": answers}))
