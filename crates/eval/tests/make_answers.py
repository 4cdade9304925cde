"""Writes `fixtures/eval/answers.json`: what lm-evaluation-harness's own filters and comparison make of answers of all kinds.

    pip install lm-eval==0.4.13 && python crates/eval/tests/make_answers.py
"""

import json
import pathlib

import lm_eval.tasks
import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

OUT = pathlib.Path(__file__).parents[3] / "fixtures" / "eval" / "answers.json"
TEXTS = [
    "5+7=<<5+7=12>>12\n#### 12",
    "#### 1,335",
    "#### $1335",
    "#### -7\n\nAnd then #### 8",
    "####12",
    "#### twelve",
    "The answer is 12.",
    "The answer is 12",
    "The answer is 1,335.00 euros. The answer is 7.",
    "The answer is $12.",
    "The answer is -7.\n",
    "So it is $1,335.",
    "3 cups cost 12 euros, ... and 1 is left",
    "no number at all",
    "a dot . and a comma , and two .. of them",
    "-",
    "--5",
    "12.50$",
    "#### 12.\n#### 13",
    "   #### 12   ",
    "#### 007",
    "x = 4\u00a0000, \u0663\u0664 and \uff17",
    "1e5",
    "#### .5",
]
GOLDS = ["#### 12", "a\n#### 1,335", "#### -7", "b #### 5 #### 1", "#### 12.", "#### $12", "#### .5", "#### 00"]


def task(name):
    class Loader(yaml.SafeLoader):
        pass

    path = pathlib.Path(lm_eval.tasks.__file__).parent / "gsm8k" / f"{name}.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)


cases = []
for name in ("gsm8k", "gsm8k-cot"):
    config = task(name)
    ignore = config["metric_list"][0]["regexes_to_ignore"]
    for text in TEXTS:
        found = {}
        for pipeline in config["filter_list"]:
            options = {k: v for k, v in pipeline["filter"][0].items() if k != "function"}
            found[pipeline["name"]] = list(RegexFilter(**options).apply([[text]], [{}]))[0][0]
        for gold in GOLDS:
            reference = gold.split("####")[-1].strip() if name == "gsm8k-cot" else gold
            match = {
                key: float(exact_match_hf_evaluate([answer], [reference], regexes_to_ignore=ignore, ignore_case=True)["exact_match"])
                for key, answer in found.items()
            }
            if gold == GOLDS[0] or any(match.values()):
                cases.append({"task": config["task"], "text": text, "gold": gold, "found": found, "match": match})
OUT.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
