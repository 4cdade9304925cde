"""An agent of pydantic-ai: answers of a type, by a call and by a schema, from random weights, and a stream of text."""

import asyncio
import json
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: Literal["Bern", "Oslo", "Lima"]
    degrees: int = Field(ge=-9, le=39)
    rain: bool


async def main(url: str, name: str, text: str) -> None:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    model = OpenAIChatModel(name, provider=provider)
    found = []
    for output in (ToolOutput(Weather), NativeOutput(Weather)):
        agent = Agent(model, output_type=output)
        for seed in range(4):
            settings = {"temperature": 1.0, "seed": seed, "max_tokens": 400}
            result = await agent.run("What is the weather?", model_settings=settings)
            assert isinstance(result.output, Weather), result.output
            found.append(result.output.model_dump())

    pieces = []
    agent = Agent(OpenAIChatModel(text, provider=provider))
    async with agent.run_stream("How many days are in a week?", model_settings={"temperature": 0}) as stream:
        async for piece in stream.stream_text(delta=True, debounce_by=None):
            pieces.append(piece)
    print(json.dumps({"found": found, "pieces": len(pieces), "text": "".join(pieces)}))


asyncio.run(main(*sys.argv[1:]))
