"""How fast a model will decode, from its shape and a machine's rates: no weight is loaded and nothing runs.

Seconds of one token = layers x (bookkeeping + what of the experts takes longer: reading the misses, or
computing the hits meanwhile; and the last miss computed behind it) + the weights that every token multiplies.
A layer misses now one expert and now several: what it takes is a mean over the numbers that a hit rate makes
likely, and no layer's is that of the mean number.

What the shape cannot say is how a model routes. Of the share of requests that a cache of a share x of the
experts serves, the odds are a multiple of the odds of x, nearly the same one at an eighth and at three
quarters of the experts (docs/log.md): 2.3 to 4 in trained models that we measured under our policy, 1 with
even routing, 10 and more where an answer repeats itself. So a prediction has a band, and its ends are those.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from melinoe.config import parse_bytes
from melinoe.errors import MelinoeError

HIT_ODDS = {"decay": 3.3, "lfu": 3.0, "lru": 2.7}  # over the odds of the share of experts that are held
EVEN, NARROW = 1.0, 12.0  # the same at the ends of the band: even routing, routing that keeps to few
MARGIN = 0.15  # of the rates themselves, were they measured exactly
MOST_MARGIN = 0.5  # with what is not known of them
# where a machine is described and not measured: bytes a second of weights in memory, and seconds per layer
HOST_MEMORY, LAYER_SECONDS, MISSED_SECONDS = 20e9, 3e-4, 6e-4
# on a GPU, with captured steps; the seconds are those of an H100 (docs/results.md, On a GPU)
DEVICE_MEMORY, DEVICE_LAYER_SECONDS, DEVICE_MISSED_SECONDS = 600e9, 1.8e-4, 1.3e-4


@dataclass(frozen=True)
class Shape:
    """What a token asks for. dense_bytes: of weights that every token multiplies by, all layers together."""

    num_layers: int
    num_experts: int
    top_k: int
    dense_bytes: int


@dataclass(frozen=True)
class Rates:
    """A machine, for experts in one format.

    layer_seconds: bookkeeping of one layer whose experts are all at hand. missed_seconds: what is added where
    none is, reading apart; half of it comes with the first miss. dense_bytes_per_second: weights by one row.
    expert_seconds: one expert on one row. group_seconds: in which 1, 2, ... records are fetched that are
    asked for together, as many as a token has experts. spread: by what share of it any of them may be off,
    because it was not measured for longer.
    """

    layer_seconds: float
    missed_seconds: float
    dense_bytes_per_second: float
    expert_seconds: float
    group_seconds: tuple[float, ...]
    spread: float = 0.0


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and between which values they lie. hit_rate: that was assumed."""

    tokens_per_second: float
    low: float
    high: float
    hit_rate: float


def hit_rate(policy: str, slots: int, num_experts: int, odds: float | None = None) -> float:
    """The share of a token's experts that are at hand, as trained models route, or by other odds."""
    if slots >= num_experts:
        return 1.0
    times = HIT_ODDS[policy] if odds is None else odds
    return times * slots / (times * slots + num_experts - slots)


def layer_seconds(rates: Rates, top_k: int, missed: int) -> float:
    """Of a layer that misses so many of a token's experts."""
    each = rates.expert_seconds
    if not missed:
        return rates.layer_seconds + top_k * each
    read = rates.group_seconds[missed - 1]
    # what is at hand is computed while others are read, and of these all but the last
    experts = max(max(read, (top_k - missed) * each) + each, top_k * each)
    return rates.layer_seconds + rates.missed_seconds * (1 + missed / top_k) / 2 + experts


def token_seconds(shape: Shape, rates: Rates, hits: float) -> float:
    """Of one decoded token whose experts are at hand with probability `hits`, each for itself."""
    top_k = shape.top_k
    layer = sum(
        math.comb(top_k, missed) * (1 - hits) ** missed * hits ** (top_k - missed)
        * layer_seconds(rates, top_k, missed)
        for missed in range(top_k + 1)
    )  # fmt: skip
    return shape.num_layers * layer + shape.dense_bytes / rates.dense_bytes_per_second


def predict(shape: Shape, rates: Rates, policy: str, slots: int) -> Speed:
    """The speed of decoding with so many slots in every layer, and its band."""

    def speed(hits: float) -> float:
        return 1 / token_seconds(shape, rates, hits)

    likely = hit_rate(policy, slots, shape.num_experts)
    worst = hit_rate(policy, slots, shape.num_experts, EVEN)
    best = hit_rate(policy, slots, shape.num_experts, NARROW) if slots else 0.0
    margin = min(MARGIN + rates.spread, MOST_MARGIN)
    return Speed(speed(likely), speed(worst) * (1 - margin), speed(best) * (1 + margin), likely)


@dataclass(frozen=True)
class Machine:
    """A machine that is not here. Sizes in bytes, rates in bytes a second.

    gpu: memory of its device, 0 without one. ram: of its host. read: of its disk. bus: from host to device.
    memory: how fast weights are read from where they are computed.
    """

    ram: int
    read: float
    gpu: int = 0
    bus: float = 0.0
    memory: float = HOST_MEMORY

    @property
    def budget_bytes(self) -> int:
        """Where the slots are: in the device's memory, or in the host's."""
        return self.gpu or self.ram

    def record_rate(self, expert_bytes: int) -> float:
        """Bytes a second of a miss: over the bus where the host holds all experts, else from the disk."""
        if self.gpu and expert_bytes <= self.ram:
            return self.bus
        return min(self.read, self.bus) if self.gpu else self.read

    def rates(self, record_bytes: int, expert_bytes: int, top_k: int) -> Rates:
        """Of experts in records of so many bytes, all together so many; a token asks for top_k of a layer."""
        record = record_bytes / self.record_rate(expert_bytes)
        return Rates(
            DEVICE_LAYER_SECONDS if self.gpu else LAYER_SECONDS,
            DEVICE_MISSED_SECONDS if self.gpu else MISSED_SECONDS,
            self.memory,
            record_bytes / self.memory,
            tuple(record * count for count in range(1, top_k + 1)),
        )


def parse_machine(text: str) -> Machine:
    """A machine from `gpu=24GiB,ram=64GiB,read=7GB/s,bus=25GB/s`; memory=900GB/s may stand there too.

    Raises:
        MelinoeError: an unknown part, a size that is none, or ram, read or (with a gpu) bus missing.
    """
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("gpu", "ram", "read", "bus", "memory") or not value:
            raise MelinoeError(
                "unknown part of a machine", got=repr(part), allowed="gpu=, ram=, read=, bus=, memory="
            )
        rate = name in ("read", "bus", "memory")
        if rate != bool(re.search(r"/\s*s$", value)):
            raise MelinoeError(
                f"{name}= takes {'a rate' if rate else 'a size'}",
                got=value,
                allowed="such as 7GB/s" if rate else "such as 24GiB",
            )
        sizes[name] = parse_bytes(re.sub(r"/\s*s$", "", value))
    for needed in ("ram", "read", *(["bus"] if "gpu" in sizes else [])):
        if needed not in sizes:
            raise MelinoeError(f"a machine needs {needed}=", got=text)
    sizes.setdefault("memory", DEVICE_MEMORY if "gpu" in sizes else HOST_MEMORY)
    return Machine(**sizes)
