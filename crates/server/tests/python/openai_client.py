"""The client `openai` of PyPI, unchanged, against the server at argv[1]: sync, async, streaming, raw ids, errors."""

import asyncio
import json
import sys
import typing

import openai
import pydantic

url = sys.argv[1]
client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
QUESTION = [{"role": "user", "content": "How many days are in a week?"}]


def chat():
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop" and choice.message.role == "assistant", answer
    assert "seven" in choice.message.content.lower() or "7" in choice.message.content, answer
    assert len(choice.logprobs.content[0].top_logprobs) == 2, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer
    return choice.message.content


def stream(expected):
    text, usage = "", None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, stream=True, stream_options=options):
        usage = chunk.usage or usage
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    assert text == expected, (text, expected)
    assert usage.completion_tokens > 0, usage
    # The SDK's own accumulator is stricter about the form of chunks.
    with client.chat.completions.stream(model="tiny", messages=QUESTION, temperature=0) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == expected, final


async def many():
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="any") as other:
        calls = [other.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=4) for _ in range(8)]
        answers = await asyncio.gather(*calls)
        assert len({answer.choices[0].message.content for answer in answers}) == 1, answers
        events = await other.completions.create(model="tiny", prompt="One two", max_tokens=4, temperature=0, stream=True)
        assert "".join([event.choices[0].text async for event in events if event.choices]), "no text"


def completions():
    text = client.completions.create(model="tiny", prompt="How many", max_tokens=4, temperature=0)
    ids = [1264, 72, 101]
    raw = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=1, temperature=0, echo=True, logprobs=1)
    assert text.choices[0].text and len(raw.choices) == 2, (text, raw)
    assert len(raw.choices[0].logprobs.token_logprobs) == len(ids) + 1, raw
    assert raw.choices[0].logprobs.token_logprobs[0] is None, raw


def errors():
    for call, kind, code in [
        (lambda: client.chat.completions.create(model="nothing", messages=QUESTION), openai.NotFoundError, "model_not_found"),
        (lambda: client.chat.completions.create(model="tiny", messages=QUESTION, temperature=-1), openai.BadRequestError, "invalid_value"),
        (lambda: client.completions.create(model="tiny", prompt="word " * 2000), openai.BadRequestError, "context_length_exceeded"),
    ]:
        try:
            call()
        except kind as error:
            assert error.code == code and error.request_id, (error.code, error.request_id)
        else:
            raise AssertionError(f"{code}: no error")
    try:
        for _ in client.chat.completions.create(model="broken", messages=[{"role": "user", "content": "a b c d"}], stream=True):
            pass
    except openai.APIError as error:
        assert error.code == "internal_error", error.code
    else:
        raise AssertionError("an error in a stream is not raised")


def tools():
    """The accumulator of streams, and the parser of arguments into types."""

    class Weather(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Weather, name="weather")
    question = [{"role": "user", "content": "The weather?"}]
    with client.chat.completions.stream(model="caller", messages=question, tools=[tool]) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds, kinds
    whole = client.chat.completions.parse(model="caller", messages=question, tools=[tool])
    for choice in (final.choices[0], whole.choices[0]):
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see.", choice
        assert choice.message.reasoning_content == "Where?", choice
        assert choice.message.tool_calls[0].function.parsed_arguments == Weather(city="Bern"), choice
    # The small model has no form of calls: the server describes the tool, and makes the call valid.
    class Trip(pydantic.BaseModel):
        city: typing.Literal["Bern", "Rome"]
        days: typing.Literal[1, 2, 3]

    trip = openai.pydantic_function_tool(Trip, name="trip")
    for choice in ("required", {"type": "function", "function": {"name": "trip"}}):
        with client.chat.completions.stream(model="tiny", messages=question, tools=[trip], tool_choice=choice, temperature=1) as events:
            made = events.get_final_completion().choices[0]
        assert made.finish_reason == "tool_calls", made
        assert isinstance(made.message.tool_calls[0].function.parsed_arguments, Trip), made

    call = whole.choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "rain"}
    client.chat.completions.create(model="caller", messages=[*question, call, result], tools=[tool])


def parsed():
    """Answers that the SDK reads into a type, with a form of the answer and with tools."""

    class Answer(pydantic.BaseModel):
        days: typing.Literal[5, 6, 7]
        sure: bool
        words: typing.Annotated[list[typing.Literal["day", "week"]], pydantic.Field(max_length=3)]

    class Trip(pydantic.BaseModel):
        city: typing.Literal["Bern", "Rome"]

    trip = openai.pydantic_function_tool(Trip, name="trip")
    ways = [client.chat.completions.parse]
    if hasattr(client, "beta") and hasattr(client.beta, "chat"):
        ways.append(client.beta.chat.completions.parse)
    for parse in ways:
        for seed in range(3):
            request = {"model": "tiny", "messages": QUESTION, "temperature": 1.5, "seed": seed, "max_tokens": 500}
            choice = parse(response_format=Answer, **request).choices[0]
            assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Answer), choice
            # A hot model that may make several calls makes them until the limit.
            choice = parse(tools=[trip], tool_choice="required", parallel_tool_calls=False, **request).choices[0]
            arguments = [call.function.parsed_arguments for call in choice.message.tool_calls]
            assert choice.finish_reason == "tool_calls" and all(isinstance(each, Trip) for each in arguments), choice
            # Both: either is an answer.
            choice = parse(response_format=Answer, tools=[trip], parallel_tool_calls=False, **request).choices[0]
            calls = choice.message.tool_calls or []
            assert isinstance(choice.message.parsed, Answer) or isinstance(calls[0].function.parsed_arguments, Trip), choice
    with client.chat.completions.stream(model="tiny", messages=QUESTION, response_format=Answer, temperature=1.5, max_tokens=200) as events:
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Answer)


def models():
    listed = [model.id for model in client.models.list()]
    assert listed[0] == "tiny" and client.models.retrieve("tiny").id == "tiny", listed
    return listed


expected = chat()
stream(expected)
asyncio.run(many())
completions()
errors()
tools()
parsed()
print(json.dumps({"openai": openai.__version__, "models": models()}))
