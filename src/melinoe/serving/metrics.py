"""What /metrics shows, with prometheus-client. docs/grafana.json draws it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
OUTCOMES = ("stop", "length", "cancelled", "rejected", "failed")


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.running = Gauge("melinoe_requests_running", "Prompts that are computed.", **own)
        self.waiting = Gauge("melinoe_requests_waiting", "Prompts that wait for a place.", **own)
        self.requests = Counter(
            "melinoe_requests", "Prompts by how they ended.", ["outcome"], registry=self.registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.prompt_tokens = Counter("melinoe_prompt_tokens", "Tokens of prompts.", **own)
        self.cached_tokens = Counter(
            "melinoe_cached_prompt_tokens",
            "Tokens of prompts that were in the KV cache from an earlier one.",
            **own,
        )
        self.generated_tokens = Counter("melinoe_generated_tokens", "Tokens of answers.", **own)
        self.first_token = Histogram(
            "melinoe_time_to_first_token_seconds",
            "From a request's arrival to its first token, the wait in the queue included.",
            buckets=SECONDS,
            **own,
        )
        self.per_token = Histogram(
            "melinoe_time_per_output_token_seconds",
            "Between two tokens of an answer.",
            buckets=SECONDS,
            **own,
        )
        self.request_seconds = Histogram(
            "melinoe_request_seconds", "From a request's arrival to its end.", buckets=SECONDS, **own
        )
        self.healthy = Gauge("melinoe_healthy", "1: answers; 0: the engine has failed.", **own)
        self.cache_use = Gauge(
            "melinoe_kv_cache_use_ratio", "Share of the KV cache that running requests hold.", **own
        )
        self.load_seconds = Gauge("melinoe_model_load_seconds", "Time the model took to load.", **own)
        ProcessCollector(registry=self.registry)

    def watch_experts(self, model: Any) -> None:
        """Adds the counters of an offloaded model; a resident one has none."""
        paged = getattr(model, "melinoe_paged", None)
        if paged is not None:
            self.registry.register(_Experts(paged.pager))


class _Experts:
    """Reads the pager's own counters when they are asked for."""

    def __init__(self, pager: Any) -> None:
        self._pager = pager

    def collect(self) -> Iterable[Metric]:
        counted = self._pager.statistics
        hits = CounterMetricFamily(
            "melinoe_expert_cache_hits", "Experts that were asked for and in a slot.", labels=["phase"]
        )
        misses = CounterMetricFamily(
            "melinoe_expert_cache_misses", "Experts that were asked for and had to be read.", labels=["phase"]
        )
        moved = CounterMetricFamily(
            "melinoe_expert_transfer_bytes", "Bytes of experts that were read.", labels=["phase"]
        )
        for phase in ("prefill", "decode"):
            hits.add_metric([phase], getattr(counted, f"{phase}_hits"))
            misses.add_metric([phase], getattr(counted, f"{phase}_loads"))
            moved.add_metric([phase], getattr(counted, f"{phase}_bytes"))
        moved.add_metric(["preload"], counted.preload_bytes)
        yield from (hits, misses, moved)
        yield CounterMetricFamily(
            "melinoe_expert_preloads", "Predicted experts that were read ahead.", value=counted.preload_loads
        )
        yield CounterMetricFamily(
            "melinoe_expert_evictions", "Experts that lost their slot.", value=counted.evictions
        )
        yield CounterMetricFamily(
            "melinoe_expert_stalled_seconds",
            "Time the computation waited for an expert.",
            value=counted.stalled_seconds,
        )
        yield CounterMetricFamily(
            "melinoe_expert_preload_stalled_seconds",
            "Of that, for predicted experts that were still on their way.",
            value=counted.preload_stalled_seconds,
        )
        slots = sum(bank.buffer.count for bank in self._pager.banks)
        used = sum(len(resident) for resident in self._pager.policy.resident)
        yield GaugeMetricFamily("melinoe_expert_slots", "Slots of all layers.", value=slots)
        yield GaugeMetricFamily("melinoe_expert_slots_in_use", "Slots that hold an expert.", value=used)
