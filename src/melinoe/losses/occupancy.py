"""How full a cache would be of each expert: the state that the cache simulation loss is taken against.

The paper's soft cache c(t) holds C slots' worth of experts in proportion to a fading count of requests. A
real cache holds an expert once or not at all, and which ones depends on its policy. Each form below maps
the same requests to [..., S, E] values, the state before token t is served:

    plain      c(t) as printed (Eq. 11): up to C / K for one expert, so it pays for concentration without end
    clipped    min(c(t), 1): a slot holds an expert once; the clip is in the loss alone, not in c(t)
    lru        Che's approximation of LRU: 1 - exp(-a T), a the fading rate of requests, T such that all
               experts together fill C slots (Che, Tung and Wang 2002)
    counts     the runtime's own policy: the C experts of the largest decayed counts (routing.policies),
    softly previous   what the token before asked for: ReMoE's reward, and no cache at all

Shape suffixes: N caches, S positions, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch

from melinoe.routing.policies import DECAY, RECENCY_DECAY, RECENCY_WEIGHT

Cache = Literal["plain", "clipped", "lru", "counts", "previous"]
CACHES: tuple[Cache, ...] = ("plain", "clipped", "lru", "counts", "previous")
CHUNK = 64  # positions per triangular product: longer ones cost work that grows with it, shorter ones calls
COUNTS_WIDTH = 0.5  # of the soft edge between resident and not, in standard deviations of the counts
NEWTON_STEPS = 40  # at most; a dozen do nearly always


def decayed_counts(
    requests_NSE: torch.Tensor, gamma: float, start: float = 0.0, chunk: int = CHUNK
) -> torch.Tensor:
    """start * gamma^t + sum_{s<t} gamma^(t-1-s) r(s) for every position t: what was asked before t, fading.

    As one product with a lower-triangular matrix per chunk; the state is carried from chunk to chunk, so
    memory grows with S, not with its square.

    Args:
        requests_NSE: [..., S, E] r(t); positions count from 0, padding may only follow.
        start: what every expert has at t = 0.
    """
    *_, size, num_experts = requests_NSE.shape
    make = {"dtype": requests_NSE.dtype, "device": requests_NSE.device}
    length = min(chunk, max(size, 1))
    step = torch.arange(length, **make)
    age = step[:, None] - 1 - step[None, :]
    # 0 ** 0 = 1 is what gamma = 0 (only the last token counts) needs
    decay = torch.where(age >= 0, torch.tensor(gamma, **make) ** age.clamp_min(0), 0.0)
    fade = torch.tensor(gamma, **make) ** torch.arange(length + 1, **make)
    state = requests_NSE.new_full((*requests_NSE.shape[:-2], 1, num_experts), start)
    states = []
    for begin in range(0, size, length):
        now = requests_NSE[..., begin : begin + length, :]
        count = now.shape[-2]
        states.append(fade[:count, None] * state + decay[:count, :count] @ now)
        if begin + count < size:
            state = gamma * states[-1][..., -1:, :] + now[..., -1:, :]
    return torch.cat(states, -2) if states else requests_NSE


def cache_states(
    requests_NSE: torch.Tensor, capacity: int, gamma: float, top_k: int, chunk: int = CHUNK
) -> torch.Tensor:
    """c(t) for every position, the state BEFORE token t is served; |c(t)|_1 = C (Eq. 11).

    Closed form of c(t+1) = (gamma Z(t) c(t) + r(t)) / Z(t+1), Z(t+1) = gamma Z(t) + K/C, from c(0) = C/E and
    Z(0) = 1:

        c(t) = (gamma^t C/E + sum_{s<t} gamma^(t-1-s) r(s)) / Z(t)
        Z(t) = gamma^t + (K/C) (1 - gamma^t) / (1 - gamma)        (1 + t K/C where gamma = 1)

    Args:
        requests_NSE: [..., S, E] r(t); positions count from 0, padding may only follow.
    """
    *_, size, num_experts = requests_NSE.shape
    counts = decayed_counts(requests_NSE, gamma, capacity / num_experts, chunk)
    time = torch.arange(size, device=requests_NSE.device, dtype=torch.float64)
    powers = torch.tensor(gamma, dtype=torch.float64, device=requests_NSE.device) ** time
    grown = time if gamma == 1 else (1 - powers) / (1 - gamma)
    weight = powers + top_k / capacity * grown
    return counts / weight.to(requests_NSE.dtype)[:, None]


def policy_counts(requests_NSE: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """[..., S, E] what the default policy, without a prediction, thinks of each expert before token t."""
    slow = decayed_counts(requests_NSE, DECAY, chunk=chunk)
    return slow + RECENCY_WEIGHT * decayed_counts(requests_NSE, RECENCY_DECAY, chunk=chunk)


def _edge(worth_NSE: torch.Tensor, capacity: int) -> torch.Tensor:
    """[..., S, 1] the middle between the last expert that has a slot and the first that has none."""
    best = worth_NSE.topk(min(capacity + 1, worth_NSE.shape[-1]), -1).values
    return best[..., -2:].mean(-1, keepdim=True)


def resident_by_counts(requests_NSE: torch.Tensor, capacity: int, chunk: int = CHUNK) -> torch.Tensor:
    """[..., S, E] 1 for the experts in the slots of the default policy, 0 for the others; no gradient.

    A tie at the edge counts as absent, so an empty cache holds nothing.
    """
    with torch.no_grad():
        worth_NSE = policy_counts(requests_NSE, chunk)
        if capacity >= worth_NSE.shape[-1]:
            return torch.ones_like(worth_NSE)
        return (worth_NSE > _edge(worth_NSE, capacity)).to(worth_NSE.dtype)


def _soft_counts(requests_NSE: torch.Tensor, capacity: int, chunk: int) -> torch.Tensor:
    worth_NSE = policy_counts(requests_NSE, chunk)
    if capacity >= worth_NSE.shape[-1]:
        return torch.ones_like(worth_NSE)
    with torch.no_grad():
        width = (COUNTS_WIDTH * worth_NSE.std(-1, keepdim=True)).clamp_min(1e-6)
    # the edge moves with the counts: who rises lowers those that stand at it
    return ((worth_NSE - _edge(worth_NSE, capacity)) / width).sigmoid()


def _che(requests_NSE: torch.Tensor, capacity: int, gamma: float, chunk: int) -> torch.Tensor:
    """Occupancies 1 - exp(-a T) that sum to C; differentiable, T by the implicit function theorem."""
    num_experts = requests_NSE.shape[-1]
    if capacity >= num_experts:
        return torch.ones_like(requests_NSE)
    # a thin even rate, so that T exists where fewer than C experts were asked for
    rate_NSE = decayed_counts(requests_NSE, min(gamma, 0.999), chunk=chunk) + 1e-3
    # Newton from below: the sum is concave in T, so it rises to the root and stops there
    with torch.no_grad():
        time = torch.full_like(rate_NSE[..., :1], 1e-6)
        for _ in range(NEWTON_STEPS):
            gone = (-rate_NSE * time).exp()
            step = (capacity - (1 - gone).sum(-1, keepdim=True)) / (rate_NSE * gone).sum(-1, keepdim=True)
            time = time + step
            if float(step.abs().max()) <= 1e-5 * float(time.abs().max()):
                break
        slope = (rate_NSE * (-rate_NSE * time).exp()).sum(-1, keepdim=True)
    # one more step with gradient through its rates: its derivative is that of the root
    excess = (1 - (-rate_NSE * time).exp()).sum(-1, keepdim=True) - capacity
    return 1 - (-rate_NSE * (time - excess / slope)).exp()


def occupancy(
    requests_NSE: torch.Tensor, cache: Cache, capacity: int, gamma: float, top_k: int, chunk: int = CHUNK
) -> torch.Tensor:
    """[..., S, E] the state before token t of one of the caches above, differentiable in the requests.

    Args:
        requests_NSE: [..., S, E] r(t) (cache_loss.straight_through_requests); padding may only follow.
        capacity: C slots. gamma: forgetting of plain, clipped and lru; the others have their own.
    """
    if cache == "previous":
        return decayed_counts(requests_NSE, 0.0, chunk=chunk)
    if cache == "counts":
        return _soft_counts(requests_NSE, capacity, chunk)
    if cache == "lru":
        return _che(requests_NSE, capacity, gamma, chunk)
    state_NSE = cache_states(requests_NSE, capacity, gamma, top_k, chunk)
    return state_NSE if cache == "plain" else state_NSE.clamp(max=1.0)
