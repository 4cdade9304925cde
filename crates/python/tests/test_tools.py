"""Calls of tools and thoughts: of the small model, which is held to them by a grammar, and of one that says what it is told to."""

import json

import pytest

import ternion
from ternion import Llama
from ternion._llama_answer import ChatShape

WEEK = [{"role": "user", "content": "How many days are in a week?"}]

DIGIT = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "show", "description": "Shows a digit.", "parameters": DIGIT}},
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
]
SCHEMAS = {"show": DIGIT, "weather": CITY}
SHOW = {"type": "function", "function": {"name": "show"}}

CALLER = '''
default_model = "caller"
[models.caller]
backend = "echo"
tool_format = "hermes"
reasoning = { start = "<think>", end = "</think>" }
options.reply = """<think>
The weather, then a digit.
</think>

Let me see.
<tool_call>
{"name": "weather", "arguments": {"city": "Bern", "days": 2}}
</tool_call>
<tool_call>
{"name": "show", "arguments": {"digit": 7}}
</tool_call>"""
'''


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    path = tmp_path_factory.mktemp("caller") / "models.toml"
    path.write_text(CALLER)
    return str(path)


def check(call):
    """That a whole call is valid, and what it calls."""
    jsonschema = pytest.importorskip("jsonschema")
    assert set(call) == {"id", "type", "function"} and call["type"] == "function" and call["id"]
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, SCHEMAS[name])
    return name, arguments


def joined(chunks):
    """The message that chunks make, by the rules of OpenAI's API, and why it ended."""
    message, calls, reason = {"content": "", "reasoning_content": ""}, [], None
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        for name in message:
            message[name] += delta.get(name, "")
        for part in delta.get("tool_calls", []):
            if part["index"] == len(calls):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                calls.append({"id": part["id"], "type": "function", "function": {**part["function"]}})
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, calls, reason


def test_a_tool_that_is_chosen_is_called(llm):
    for seed in range(3):
        reply = llm.create_chat_completion(WEEK, tools=TOOLS, tool_choice=SHOW, temperature=1.5, seed=seed)
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert {check(call)[0] for call in choice["message"]["tool_calls"]} == {"show"}


def test_one_of_the_tools_is_called_where_one_must_be(llm):
    names = set()
    for seed in range(6):
        reply = llm.create_chat_completion(WEEK, tools=TOOLS, tool_choice="required", temperature=2.0, top_p=1.0, min_p=0.0, seed=seed)
        names |= {check(call)[0] for call in reply["choices"][0]["message"]["tool_calls"]}
    assert names <= {"show", "weather"} and names


def test_the_older_form_of_tools(llm):
    functions = [tool["function"] for tool in TOOLS]
    reply = llm.create_chat_completion(WEEK, functions=functions, function_call={"name": "weather"}, seed=1)
    assert check(reply["choices"][0]["message"]["tool_calls"][0])[0] == "weather"
    reply = llm.create_chat_completion(WEEK, functions=functions, function_call="none", temperature=0)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "There are seven days in a week."}


def test_a_call_in_chunks_is_the_whole_call(llm):
    arguments = {"tools": TOOLS, "tool_choice": SHOW, "temperature": 1.0, "seed": 3}
    whole = llm.create_chat_completion(WEEK, **arguments)["choices"][0]
    chunks = list(llm.create_chat_completion(WEEK, stream=True, **arguments))
    message, calls, reason = joined(chunks)
    assert message["content"] == "" and reason == whole["finish_reason"] == "tool_calls"
    assert [call["function"] for call in calls] == [call["function"] for call in whole["message"]["tool_calls"]]
    pieces = [chunk for chunk in chunks if chunk["choices"][0]["delta"].get("tool_calls")]
    assert len(pieces) > len(calls), "the arguments come as they are made"


def test_chunks_are_those_of_the_package_openai(llm):
    pytest.importorskip("openai")
    arguments = {"tools": TOOLS, "tool_choice": SHOW, "seed": 3}
    reply = llm.create_chat_completion_openai_v1(WEEK, **arguments)
    assert reply.choices[0].message.tool_calls[0].function.name == "show"
    text = ""
    for chunk in llm.create_chat_completion_openai_v1(WEEK, stream=True, **arguments):
        for part in chunk.choices[0].delta.tool_calls or []:
            text += part.function.arguments or "" if part.index == 0 else ""
    assert text == reply.choices[0].message.tool_calls[0].function.arguments


def test_results_go_back_to_the_model(llm):
    call = {"id": "call_1", "type": "function", "function": {"name": "show", "arguments": '{"digit": 7}'}}
    messages = [
        *WEEK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "shown"},
    ]
    reply = llm.create_chat_completion(messages, tools=TOOLS, tool_choice="none", max_tokens=8)
    alone = llm.create_chat_completion(WEEK, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert reply["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]
    with pytest.raises(ternion.InvalidRequestError, match="call_2"):
        llm.create_chat_completion([*messages[:2], {**messages[2], "tool_call_id": "call_2"}], tools=TOOLS)


def test_wrong_tools_are_refused(llm, model):
    with pytest.raises(ternion.InvalidRequestError, match="missing"):
        llm.create_chat_completion(WEEK, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "missing"}})
    with pytest.raises(ternion.InvalidRequestError, match="show"):
        model.generate(WEEK, tools=[TOOLS[0], TOOLS[0]])


def test_calls_of_the_native_api(model):
    answer = model.generate(WEEK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=2)
    assert answer.finish_reason == "tool_calls" and answer.text == ""
    (call,) = answer.tool_calls
    assert check(call)[0] in SCHEMAS
    events = list(model.events(WEEK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=2))
    parts = [event for event in events if event["type"] == "tool_call"]
    assert parts[0]["id"] and parts[0]["name"] == call["function"]["name"]
    assert "".join(part["arguments"] for part in parts) == call["function"]["arguments"]
    # The text of a stream has no calls in it.
    assert "".join(model.stream(WEEK, tools=TOOLS, tool_choice="required", seed=2)) == ""


def test_a_thought_a_text_and_two_calls(caller, model):
    # Which has no tokenizer, so that `Llama` cannot load it; its dictionaries are made of the same events.
    said = ternion.load(caller)
    shape = ChatShape({}, model.tokenizer, logprobs=False)
    (choice,) = shape.whole(said.events(WEEK, tools=TOOLS))["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("The weather, then a digit.", "Let me see.")
    assert [check(call) for call in message["tool_calls"]] == [("weather", {"city": "Bern", "days": 2}), ("show", {"digit": 7})]
    chunked, calls, reason = joined(shape.chunks(said.events(WEEK, tools=TOOLS)))
    assert chunked == {name: message[name] for name in chunked} and reason == "tool_calls"
    assert [call["function"] for call in calls] == [call["function"] for call in message["tool_calls"]]

    answer = said.generate(WEEK, tools=TOOLS)
    assert (answer.reasoning, answer.text) == ("The weather, then a digit.", "Let me see.")
    assert [check(call)[0] for call in answer.tool_calls] == ["weather", "show"]


@pytest.fixture(scope="module")
def thinker(tiny):
    """The small model, whose answer about the week has a thought if these words are its tags."""
    return ternion.load(tiny, reasoning={"start": "There are", "end": "days"})


def test_the_thought_of_a_model_stands_apart(thinker, tiny, tmp_path):
    answer = thinker.generate(WEEK, temperature=0)
    assert (answer.reasoning, answer.text) == ("seven", "in a week.")
    events = list(thinker.events(WEEK, temperature=0))
    parts = {kind: "".join(event["text"] for event in events if event["type"] == kind) for kind in ("reasoning", "text")}
    assert (parts["reasoning"].strip(), parts["text"].strip()) == ("seven", "in a week.")

    path = tmp_path / "models.toml"
    path.write_text(f"[models.tiny]\npath = {json.dumps(tiny)}\nreasoning = {{ start = 'There are', end = 'days' }}\n")
    llm = Llama(str(path), n_ctx=0, verbose=False)
    (choice,) = llm.create_chat_completion(WEEK, temperature=0)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "in a week.", "reasoning_content": "seven"}
    message, _, reason = joined(llm.create_chat_completion(WEEK, temperature=0, stream=True))
    assert message == {"content": "in a week.", "reasoning_content": "seven"} and reason == "stop"


def test_a_thought_has_a_budget(thinker):
    # No token is left for the thought, so it ends as it begins.
    answer = thinker.generate(WEEK, temperature=0, reasoning_budget=0, max_tokens=20)
    assert not answer.reasoning
    assert thinker.generate(WEEK, temperature=0, reasoning_budget=50).reasoning == "seven"
