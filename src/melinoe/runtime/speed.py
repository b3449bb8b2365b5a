"""How fast a model will decode, from its shape and a machine's rates: no weight is loaded and nothing runs.

Seconds of one token = layers x (bookkeeping + what of the experts takes longer: reading the misses, or
computing the hits meanwhile; and the last miss computed behind it) + the weights that every token multiplies.

What the shape cannot say is how a model routes. The share of requests that a cache of a share x of the
experts serves lies between x (even routing) and nearly all of them; trained models that we measured stand
near x ** 0.45 under our policy (docs/log.md). So a prediction has a band, and its ends are those two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from melinoe.config import parse_bytes
from melinoe.errors import MelinoeError

HIT_EXPONENT = {"decay": 0.45, "lfu": 0.5, "lru": 0.55}  # of the share of experts that are held
EVEN, NARROW = 1.0, 0.2  # exponents of the ends of the band: even routing, routing that keeps to few
MARGIN = 0.15  # of the rates themselves
# where a machine is described and not measured: bytes a second of weights in memory, and seconds per layer
HOST_MEMORY, DEVICE_MEMORY, LAYER_SECONDS = 20e9, 600e9, 3e-4


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

    layer_seconds: bookkeeping of one layer. dense_bytes_per_second: weights by one row.
    expert_seconds: one expert on one row. record_seconds: one record fetched, as many at once as are missed.
    """

    layer_seconds: float
    dense_bytes_per_second: float
    expert_seconds: float
    record_seconds: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and between which values they lie. hit_rate: that was assumed."""

    tokens_per_second: float
    low: float
    high: float
    hit_rate: float


def hit_rate(policy: str, slots: int, num_experts: int, exponent: float | None = None) -> float:
    """The share of a token's experts that are at hand, as trained models route, or by another exponent."""
    if slots >= num_experts:
        return 1.0
    return (slots / num_experts) ** (HIT_EXPONENT[policy] if exponent is None else exponent)


def token_seconds(shape: Shape, rates: Rates, hits: float) -> float:
    """Of one decoded token."""
    wanted, missed = shape.top_k * hits, shape.top_k * (1 - hits)
    behind = rates.expert_seconds * min(1.0, missed)
    experts = max(missed * rates.record_seconds, wanted * rates.expert_seconds) + behind
    if missed:  # whoever is not computed while others are read is computed then
        experts = max(experts, shape.top_k * rates.expert_seconds)
    dense = shape.dense_bytes / rates.dense_bytes_per_second
    return shape.num_layers * (rates.layer_seconds + experts) + dense


def predict(shape: Shape, rates: Rates, policy: str, slots: int) -> Speed:
    """The speed of decoding with so many slots in every layer, and its band."""

    def speed(hits: float) -> float:
        return 1 / token_seconds(shape, rates, hits)

    likely = hit_rate(policy, slots, shape.num_experts)
    worst = hit_rate(policy, slots, shape.num_experts, EVEN)
    best = hit_rate(policy, slots, shape.num_experts, NARROW) if slots else 0.0
    return Speed(speed(likely), speed(worst) * (1 - MARGIN), speed(best) * (1 + MARGIN), likely)


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

    def rates(self, record_bytes: int, expert_bytes: int) -> Rates:
        """Of experts in records of so many bytes, all together so many."""
        return Rates(
            LAYER_SECONDS,
            self.memory,
            record_bytes / self.memory,
            record_bytes / self.record_rate(expert_bytes),
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
