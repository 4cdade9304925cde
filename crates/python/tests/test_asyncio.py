"""The native API with asyncio."""

import asyncio
import time

import pytest

import ternion

WEEK = [{"role": "user", "content": "How many days are in a week?"}]
LONG = {"ignore_eos": True, "max_tokens": 900}


async def idle(model):
    for _ in range(1000):
        if model.stats()["active"] == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the generation goes on")


def test_answers_are_those_of_the_blocking_calls(model, tiny):
    async def main():
        loaded = await ternion.aload(tiny)
        answer = await loaded.agenerate(WEEK)
        pieces = [piece async for piece in loaded.stream(WEEK)]
        events = [event["type"] async for event in loaded.events(WEEK)]
        scores = await loaded.ascore([1, 2, 3])
        return answer, pieces, events, scores

    answer, pieces, events, scores = asyncio.run(main())
    assert answer.text == "".join(pieces) == model.generate(WEEK).text
    assert events[-1] == "done"
    assert scores == model.score([1, 2, 3])


def test_the_event_loop_is_not_blocked(model):
    async def main():
        ticks = 0
        task = asyncio.create_task(model.agenerate("Once", **LONG))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.001)
        return ticks, (await task).usage.completion_tokens

    ticks, tokens = asyncio.run(main())
    assert tokens == 900 and ticks > 10


def test_many_at_once(model):
    async def main():
        return await asyncio.gather(*(model.agenerate(WEEK) for _ in range(12)))

    assert {answer.text for answer in asyncio.run(main())} == {model.generate(WEEK).text}


def test_a_cancelled_task_ends_the_generation(model):
    async def read():
        async for _ in model.stream("Once", **LONG):
            pass

    async def main():
        for work in (read(), model.agenerate("Once", **LONG)):
            task = asyncio.create_task(work)
            while model.stats()["active"] == 0:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(model)

    asyncio.run(main())


def test_leaving_a_loop_ends_the_generation(model):
    async def main():
        async for _ in model.stream("Once", **LONG):
            break
        await idle(model)
        async with model.stream("Once", **LONG) as stream:
            await stream.__anext__()
        await idle(model)

    asyncio.run(main())


def test_a_deadline(model):
    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.agenerate("Once", ignore_eos=True, max_tokens=900), 0.01)
        await idle(model)

    asyncio.run(main())


def test_errors_are_raised_where_they_are_awaited(model, tmp_path):
    async def main():
        with pytest.raises(ternion.InvalidRequestError, match="temperature"):
            await model.agenerate("Once", temperature=-1)
        with pytest.raises(ternion.ContextOverflowError):
            async for _ in model.stream([5] * 2000):
                pass
        with pytest.raises(FileNotFoundError):
            await ternion.aload(tmp_path / "missing")

    asyncio.run(main())


def test_a_loop_that_is_closed_with_work_under_way(model):
    async def main():
        stream = model.stream("Once", **LONG)
        await stream.__anext__()
        return stream

    stream = asyncio.run(main())
    # The stream goes on without the loop.
    assert isinstance(next(stream), str)
    stream.close()
    deadline = time.monotonic() + 10
    while model.stats()["active"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert model.stats()["active"] == 0
