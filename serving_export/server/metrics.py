"""Prometheus metrics of the server, with vLLM's names (prefix aside), so that dashboards work for both."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving_export.server.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServerMetrics:
    """Latency histograms and counters of the server, and the engine's own counters at each scrape."""

    def __init__(self, engine: Engine, model_name: str):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model_name))
        self.time_to_first_token_seconds = Histogram(
            "dramatis_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.inter_token_seconds = Histogram(
            "dramatis_inter_token_latency_seconds", "Between a reply's successive tokens.",
            buckets=_TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "dramatis_e2e_request_latency_seconds", "From a request's arrival to its last token.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.disconnects = Counter(
            "dramatis_client_disconnects", "Clients that disconnected before the end of the answer, by stage: body, "
            "encode, queue, prefill or decode.", ["stage"], registry=self.registry,
        )  # fmt: skip
        self.requests = Counter(
            "dramatis_http_requests", "Chat completion requests by HTTP status.", ["status"], registry=self.registry
        )

    def render(self) -> bytes:
        """The metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, model_name: str):
        self._engine, self._model_name = engine, model_name

    def collect(self) -> Iterator[Metric]:
        engine, allocator = self._engine, self._engine.cache.allocator
        counters, prefix, n_used = engine.counters, engine.prefix_cache.counters, engine.n_pages_in_use()
        gauges = {
            "num_requests_running": ("Requests being generated.", engine.n_running),
            "num_requests_waiting": ("Requests waiting for cache pages.", engine.n_waiting),
            "kv_cache_usage_perc": (
                "Share of cache pages that running requests use (1 is all).",
                n_used / allocator.n_pages,
            ),
            "kv_cache_reusable_perc": (
                "Share of cache pages that only the prefix cache holds, which are evicted on demand.",
                max(allocator.n_pages - allocator.n_free - n_used, 0) / allocator.n_pages,
            ),
            "prefix_cache_pages": ("Cache pages in the prefix cache.", engine.prefix_cache.n_pages),
        }
        totals = {
            "prompt_tokens": ("Prompt tokens of admitted requests.", counters.prompt_tokens),
            "generation_tokens": ("Generated tokens.", counters.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked up.", prefix.hit_tokens + prefix.missed_tokens),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", prefix.hit_tokens),
            "prefix_cache_evicted_pages": ("Pages evicted from the prefix cache.", prefix.evicted_pages),
            "num_preemptions": ("Preemptions of running requests.", counters.preemptions),
            "requests_finished": ("Requests that ended with stop or length.", counters.finished),
            "requests_cancelled": ("Requests that were cancelled.", counters.cancelled),
            "requests_failed": ("Requests that ended with an error.", counters.failed),
        }
        labels, values = ["model_name"], [self._model_name]
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"dramatis_{name}", text, labels=labels)
            gauge.add_metric(values, value)
            yield gauge
        for name, (text, value) in totals.items():
            total = CounterMetricFamily(f"dramatis_{name}", text, labels=labels)
            total.add_metric(values, value)
            yield total
