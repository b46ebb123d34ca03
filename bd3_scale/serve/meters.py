"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """Hold the counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        how: dict[str, Any] = {"namespace": "bd3_scale", "registry": self.registry}
        self.requests = Counter("requests", "Answers, by path and status", ("path", "status"), **how)
        self.waiting = Gauge("waiting_texts", "Texts in the queue", **how)
        self.active = Gauge("active_texts", "Texts that are read or denoised", **how)
        self.tokens = Counter("generated_tokens", "Tokens of texts that are at their end", **how)
        self.passes = Counter("denoising_passes", "Passes of each text, over all texts", **how)
        self.forwards = Counter("forwards", "Passes of all texts together", **how)
        self.seconds = Counter("forward_seconds", "Seconds in them", **how)
        self.cached = Gauge("cached_tokens", "Tokens in the key/value cache", **how)
        self.capacity = Gauge("cache_capacity_tokens", "Tokens that it holds", **how)
        self.first_block = Histogram("first_block_seconds", "To the first block of text", buckets=_SECONDS, **how)
        self.whole = Histogram("request_seconds", "To the end of an answer", buckets=_SECONDS, **how)
