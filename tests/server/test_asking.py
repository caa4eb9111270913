"""What a server makes of the events of its answers: their order, silence, errors, and clients that read slowly."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from mlx_gemma3.errors import DeviceLost, Gemma3Error
from mlx_gemma3.runtime.events import no_usage
from mlx_gemma3.runtime.job import done_event
from mlx_gemma3.runtime.stream import Channel, Stream
from mlx_gemma3.server import asking
from mlx_gemma3.server.asking import Running, Service
from mlx_gemma3.server.http import Flow
from mlx_gemma3.server.metrics import Metrics
from mlx_gemma3.server.models import Models
from mlx_gemma3.server.openai_chat import ChatRequest, _Answer
from mlx_gemma3.server.settings import Settings


def begun(count: int) -> tuple[Service, Running, list[Channel]]:
    """Answers that nobody gives yet."""
    models = Models(Settings(models=("demo",)), budget=1)
    service = Service(models.settings, models, Metrics())
    running, channels = Running(models.first, service.metrics, service.lost), [Channel() for _ in range(count)]
    running.streams = [Stream(channel) for channel in channels]
    running.enter(models)
    return service, running, channels


def text(word: str) -> Any:
    return {"kind": "text", "text": word, "tokens": [1]}


async def chunks(running: Running) -> list[str]:
    asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], "stream": True})
    sent: list[str] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"").decode())

    await Flow(_Answer(running, asked).chunks(), "text/event-stream", running.close)({}, receive, send)
    return [piece for piece in sent if piece]


def test_silence_is_filled_and_progress_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PING_SECONDS", 0.05)
    service, running, (channel,) = begun(1)

    def answer() -> None:
        channel.put({"kind": "pending", "stage": "prompt", "done": 512, "total": 8000})
        time.sleep(0.3)
        channel.put(text("hello"))
        channel.put(done_event("hello", [1], "stop", no_usage()))

    threading.Thread(target=answer).start()
    found = asyncio.run(chunks(running))
    assert ": reading 512/8000\n\n" in found and 2 <= found.count(": waiting\n\n") <= 6
    assert found[-1] == "data: [DONE]\n\n" and running.closed
    assert b'answers_total{reason="stop"} 1.0' in service.metrics.text(service.models)


def test_answers_take_turns() -> None:
    _, running, channels = begun(2)
    for channel, word in zip(channels, "ab", strict=True):
        for _ in range(3):
            channel.put(text(word))
        channel.put(done_event(word * 3, [1], "stop", no_usage()))

    async def follow() -> list[Any]:
        return [found async for found in running.events()]

    found = asyncio.run(follow())
    assert [index for index, _ in found] == [0, 1] * 4
    assert running.usage["completion_tokens"] == 0 and set(running.done) == {0, 1}


@pytest.mark.parametrize("kind", [Gemma3Error, DeviceLost])
def test_an_error_in_the_middle_is_told_and_ends_all(kind: type[Gemma3Error]) -> None:
    lost: list[bool] = []
    _, running, channels = begun(2)
    running._lost = lambda: lost.append(True)
    channels[0].put(text("half"))
    channels[1].fail(kind("it broke"))
    found = asyncio.run(chunks(running))
    assert '"message":"it broke"' in found[-1] and channels[0].cancelled and bool(lost) == (kind is DeviceLost)


def test_a_client_that_goes_away_cancels_and_one_that_is_slow_is_waited_for() -> None:
    _, running, (channel,) = begun(1)
    sent: list[Any] = []

    async def serve() -> None:
        gone = asyncio.Event()
        asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], "stream": True})

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 4:  # this client takes no more
                gone.set()
                await asyncio.sleep(30)

        for _ in range(1000):
            channel.put(text("word"))
        began = time.monotonic()
        await Flow(_Answer(running, asked).chunks(), "text/event-stream", running.close)({}, receive, send)
        assert time.monotonic() - began < 10

    asyncio.run(serve())
    assert len(sent) == 4 and channel.cancelled and running.closed


@pytest.mark.parametrize("turns", range(8))
def test_a_cancellation_is_not_lost_to_an_event_that_comes_with_it(turns: int) -> None:
    """As asyncio.wait_for of Python 3.11 loses it: the answer would be written to its end for nobody."""
    _, running, (channel,) = begun(1)

    async def serve() -> None:
        task = asyncio.ensure_future(running.replies())
        await asyncio.sleep(0.05)
        channel.put(text("word"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=2)
        assert task.cancelled()

    asyncio.run(serve())
    running.close()
    assert channel.cancelled


def test_a_client_that_is_gone_before_the_first_byte_leaves_nothing_in_work() -> None:
    service, running, (channel,) = begun(1)
    asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], "stream": True})

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(60)

    asyncio.run(Flow(_Answer(running, asked).chunks(), "text/event-stream", running.close)({}, receive, send))
    assert channel.cancelled and running.closed and service.models.first.held.users == 0
