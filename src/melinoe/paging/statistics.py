"""What the pager counts. A request is one expert asked for by one layer in one call.

Hit rate = hits / requests while decoding, cumulative, cold misses included. Loads are records read,
apart for prefill (misses of the prompt), preload (predicted, not asked for by the prompt) and decode. Passes
of tuning, forward and backward, are counted by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from melinoe.routing.calls import DECODE, Call, Decision, hit_rate, per


@dataclass
class Statistics:
    """Counters since the last reset. `*_bytes` are bytes of records read, padding included."""

    prefill_tokens: int = 0
    decode_tokens: int = 0  # tokens fed while decoding, summed over the batch
    decode_requests: int = 0
    decode_hits: int = 0
    prefill_requests: int = 0
    prefill_hits: int = 0
    prefill_loads: int = 0
    preload_loads: int = 0
    decode_loads: int = 0
    evictions: int = 0
    prefill_bytes: int = 0
    preload_bytes: int = 0
    decode_bytes: int = 0
    training_requests: int = 0
    training_hits: int = 0
    training_loads: int = 0
    training_bytes: int = 0
    stalled_seconds: float = 0.0  # time the computation waited for a read
    preload_stalled_seconds: float = 0.0  # of that, for records that were predicted and still on their way

    def count(self, call: Call, decision: Decision, record_bytes: int, training: bool = False) -> None:
        """Adds one decision. What decoding and a prompt both ask for counts as decoding's."""
        hits, misses = decision.hits, [load.expert for load in decision.loads]
        if call.decoding is None or training:
            phase = "training" if training else "decode" if call.phase == DECODE else "prefill"
            self._add(phase, len(hits), len(misses), record_bytes)
        else:
            decoded = set(call.indices[call.decoding].ravel().tolist())
            decode_hits, decode_misses = len(decoded.intersection(hits)), len(decoded.intersection(misses))
            self._add("decode", decode_hits, decode_misses, record_bytes)
            self._add("prefill", len(hits) - decode_hits, len(misses) - decode_misses, record_bytes)
        preloads = len(decision.preloads)
        self.preload_loads += preloads
        self.preload_bytes += preloads * record_bytes
        self.evictions += sum(load.victim is not None for load in [*decision.loads, *decision.preloads])

    def count_hits(self, requests: int) -> None:
        """Adds a decision on a decoded token all of whose experts are there."""
        self.decode_requests += requests
        self.decode_hits += requests

    def _add(self, phase: str, hits: int, loads: int, record_bytes: int) -> None:
        for name, value in (
            ("requests", hits + loads),
            ("hits", hits),
            ("loads", loads),
            ("bytes", loads * record_bytes),
        ):
            setattr(self, f"{phase}_{name}", getattr(self, f"{phase}_{name}") + value)

    @property
    def hit_rate(self) -> float | None:
        """Decode hits per decode request; None before anything was decoded."""
        return hit_rate(self.decode_hits, self.decode_requests - self.decode_hits)

    @property
    def loads_per_token(self) -> float | None:
        """Records read while decoding, per decoded token, all layers together."""
        return per(self.decode_loads, self.decode_tokens)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read while decoding, per decoded token."""
        return per(self.decode_bytes, self.decode_tokens)

    def since(self, earlier: Statistics) -> Statistics:
        """What was counted after `earlier`, a copy from then."""
        names = [field.name for field in fields(self)]
        return Statistics(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, field.default)

    def to_json(self) -> dict[str, Any]:
        counters = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **counters,
            "hit_rate": self.hit_rate,
            "loads_per_token": self.loads_per_token,
            "bytes_per_token": self.bytes_per_token,
        }
