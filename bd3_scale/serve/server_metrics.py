"""Count what `/metrics` reports, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The metrics of one server, in a separate registry: the global one would mix several servers in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "bd3_scale", "registry": self.registry}
        self.requests = Counter("requests", "Responses, by path and status", ("path", "status"), **options)
        self.waiting = Gauge("waiting_texts", "Texts in the queue", **options)
        self.active = Gauge("active_texts", "Texts that are prefilled or denoised", **options)
        self.tokens = Counter("generated_tokens", "Tokens of finished texts", **options)
        self.passes = Counter("denoising_passes", "Denoising passes, summed over texts", **options)
        self.forwards = Counter("forwards", "Forward passes of the batch", **options)
        self.seconds = Counter("forward_seconds", "Seconds in forward passes", **options)
        self.cached = Gauge("cached_tokens", "Tokens in the key/value cache", **options)
        self.capacity = Gauge("cache_capacity_tokens", "Tokens that the key/value cache can hold", **options)
        self.first_block = Histogram(
            "first_block_seconds", "Seconds to the first block of text", buckets=_SECONDS, **options
        )
        self.whole = Histogram("request_seconds", "Seconds to the end of an answer", buckets=_SECONDS, **options)
