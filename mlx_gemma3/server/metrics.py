"""What /metrics tells, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..runtime.events import Usage

if TYPE_CHECKING:
    from .models import Models

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server; they belong to its event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "mlx_gemma3_"
        self.requests = Counter(f"{name}requests", "HTTP requests.", ["path", "status"], registry=self.registry)
        self._answers = Counter(f"{name}answers", "Answers that ended.", ["reason"], registry=self.registry)
        self._tokens = Counter(f"{name}tokens", "Tokens of ended answers.", ["kind"], registry=self.registry)
        self._first = Histogram(
            f"{name}first_token_seconds", "To the first token.", buckets=_SECONDS, registry=self.registry
        )
        self._rows = Gauge(f"{name}answers_in_work", "Answers that are read or written now.", registry=self.registry)
        self._queue = Gauge(f"{name}queue", "Requests in line.", registry=self.registry)
        self._memory = Gauge(f"{name}memory_bytes", "MLX's memory.", ["kind"], registry=self.registry)
        self._loaded = Gauge(f"{name}models_loaded", "Models in memory.", registry=self.registry)

    @contextmanager
    def answering(self, count: int) -> Iterator[None]:
        """While so many answers are on their way."""
        self._rows.inc(count)
        try:
            yield
        finally:
            self._rows.dec(count)

    def answered(self, usage: Usage, reason: str) -> None:
        self._answers.labels(reason).inc()
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("cached").inc(usage["cached_tokens"])
        self._tokens.labels("answer").inc(usage["completion_tokens"])
        if usage["completion_tokens"]:
            self._first.observe(usage["prepare_seconds"] + usage["first_token_seconds"])

    def cancelled(self, count: int) -> None:
        if count:
            self._answers.labels("cancelled").inc(count)

    def text(self, models: Models) -> bytes:
        """The page."""
        import mlx.core as mx

        engines = [model.engine for model in models.models.values() if model.engine is not None]
        self._loaded.set(len(engines))
        self._queue.set(sum(engine.waiting for engine in engines))
        for kind, value in (
            ("active", mx.get_active_memory()),
            ("cache", mx.get_cache_memory()),
            ("peak", mx.get_peak_memory()),
        ):
            self._memory.labels(kind).set(value)
        return generate_latest(self.registry)
