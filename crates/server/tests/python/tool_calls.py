"""Calls that a model has to make, by the client `openai`, checked by `jsonschema`: argv[1] is the server, the rest are models.

The models have random weights, so that nothing but the grammar makes a call. Prints how many calls each has made.
"""

import json
import sys

import jsonschema
import openai

url, models = sys.argv[1], sys.argv[2:]
client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=300)
SEEDS = 10
QUESTION = [{"role": "user", "content": "Hi"}]


def tool(name, properties, required):
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}


TOOLS = [
    tool("weather", {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}, ["city"]),
    tool(
        "order",
        {
            "size": {"enum": ["small", "large", "ünïcode ☃"]},
            "extras": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "to": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
        },
        ["size", "extras", "to"],
    ),
    tool("clock", {}, []),
]
TOOLS[1]["function"]["parameters"]["$defs"] = {
    "place": {"type": "object", "properties": {"x": {"type": "boolean"}, "y": {"const": 4}}, "required": ["x", "y"], "additionalProperties": False}
}
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}


def check(call):
    arguments = json.loads(call.function.arguments)
    validator = jsonschema.Draft202012Validator(SCHEMAS[call.function.name])
    validator.validate(arguments)


def calls_of(model, choice, seed, parallel):
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.5, max_tokens=1200, parallel_tool_calls=parallel,
    )
    choice = answer.choices[0]
    calls = choice.message.tool_calls or []
    if choice.finish_reason == "length" and parallel:
        # It may have begun one call too many.
        calls = calls[:-1]
    else:
        assert choice.finish_reason == "tool_calls" and not choice.message.content, (model, seed, choice)
        assert len(calls) == 1 or parallel, (model, seed, choice)
        assert calls, (model, seed, choice)
    return calls


made = dict.fromkeys(models, 0)
names = {model: set() for model in models}
for model in models:
    for seed in range(SEEDS):
        for call in calls_of(model, "required", seed, parallel=False):
            check(call)
            made[model] += 1
            names[model].add(call.function.name)
        name = list(SCHEMAS)[seed % len(SCHEMAS)]
        for call in calls_of(model, {"type": "function", "function": {"name": name}}, seed, parallel=False):
            assert call.function.name == name, call
            check(call)
            made[model] += 1
    for seed in range(3):
        for call in calls_of(model, "required", seed, parallel=True):
            check(call)
            made[model] += 1
# Random weights do not mean the same name each time.
assert set.union(*names.values()) == set(SCHEMAS), names
print(json.dumps({"calls": made}))
