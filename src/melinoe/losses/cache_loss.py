"""The cache simulation loss: how many experts a small cache would miss, as a function with a gradient.

A pure function of what the routers did; the trainer calls it once per step for all layers. The
second loss of the method stands in rank_matching.py. Equation numbers are those of arXiv 2602.11192.

Shape suffixes: L MoE layers, B sequences, S positions, T = B * S tokens, E experts, K experts per token,
N rows that hold one cache each (those sequences that have tokens).
"""

from __future__ import annotations

import torch

from melinoe.losses.occupancy import CHUNK, Cache, occupancy, resident_by_counts


def straight_through_requests(requests_TE: torch.Tensor, probabilities_TE: torch.Tensor) -> torch.Tensor:
    """r(t): forward the router's own selection, backward the probabilities p_f, over all E experts (Eq. 4).

    Args:
        requests_TE: [..., E] 1 where the router asked for an expert (melinoe.models.router_tap.requests), no
            gradient.
        probabilities_TE: [..., E] p_f, with gradient.
    """
    return requests_TE.detach() + (probabilities_TE - probabilities_TE.detach())


def boundary_surrogate(
    logits_TE: torch.Tensor, requests_TE: torch.Tensor, temperature: float
) -> torch.Tensor:
    """A stand-in for p_f in the backward pass of r(t): the gradient of a soft top-K at its boundary.

    Through p_f the loss moves experts in proportion to their probability: most of all the first choice,
    which is the dearest one to change. What decides about a transfer is who stands on which side of the
    boundary between the K-th and the next expert, and there a swap costs the least. So the gradient is that
    of

        sigmoid((l_i - theta) / temperature),  theta such that they sum to K,

    that is s_i (g_i - sum_j s_j g_j / sum_j s_j) with s the sigmoid's slope: it is centred, so raising one
    expert lowers others. theta is taken as the middle between the least chosen and the best other logit.

    Args:
        logits_TE: [..., E] router logits, with gradient.
        requests_TE: [..., E] 1 for the chosen experts.
        temperature: width of the boundary, in standard deviations of a token's logits.

    Returns:
        [..., E] whose value means nothing and whose gradient is the one above.
    """
    with torch.no_grad():
        chosen = requests_TE > 0
        least = logits_TE.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
        other = logits_TE.masked_fill(chosen, -torch.inf).amax(-1, keepdim=True)
        width = (temperature * logits_TE.std(-1, keepdim=True)).clamp_min(1e-6)
        soft = ((logits_TE - (least + other) / 2) / width).sigmoid()
        slope = (soft * (1 - soft) / width).nan_to_num_(0.0)
        share = slope / slope.sum(-1, keepdim=True).clamp_min(1e-20)
    return slope * (logits_TE - (share * logits_TE).sum(-1, keepdim=True))


def scored_positions(mask_BS: torch.Tensor, answers_BS: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: the inputs that decoding processes: of each answer all tokens but the last.

    What stands before an answer only warms the cache, and its last token is never fed back by decoding. An
    answer of one token leaves nothing to score. (likelihood.next_token_positions begins one position earlier,
    with reason.)

    Args:
        mask_BS: [B, S] 1 for real tokens.
        answers_BS: [B, S] bool, the tokens of answers.
    """
    follows_BS = mask_BS.bool().roll(-1, 1) & answers_BS.roll(-1, 1)
    follows_BS[:, -1] = False
    return mask_BS.bool() & answers_BS & follows_BS


def _one_row_per_cache(mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(source [N, S'], real [N, S']): where the tokens of each cache stand in B * S, without padding.

    `source` points at B * S (one past the end) where a row has ended.
    """
    real_BS = mask_BS.bool()
    rows_BS = torch.arange(len(mask_BS), device=mask_BS.device)[:, None].expand_as(real_BS)
    tokens = real_BS.reshape(-1).nonzero()[:, 0]
    row_of_token = rows_BS.reshape(-1)[tokens]
    row_of_token = torch.unique_consecutive(row_of_token, return_inverse=True)[1]
    lengths_N = torch.bincount(row_of_token)
    first_N = lengths_N.cumsum(0) - lengths_N
    position = torch.arange(len(tokens), device=tokens.device) - first_N[row_of_token]
    size = int(lengths_N.max()) if len(lengths_N) else 0
    source = tokens.new_full((len(lengths_N), size), mask_BS.numel())
    source[row_of_token, position] = tokens
    return source, source < mask_BS.numel()


def _caches(
    requests_LBSE: torch.Tensor, mask_BS: torch.Tensor, scored_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(requests [L, N, S', E], scored [N, S']): one row for each cache, without padding before its end."""
    batch, size, num_experts = requests_LBSE.shape[-3:]
    source_NS, real_NS = _one_row_per_cache(mask_BS)
    source = source_NS.clamp(max=batch * size - 1).reshape(-1)
    flat_LTE = requests_LBSE.reshape(-1, batch * size, num_experts)
    # what stands behind the end of a row comes after every scored token of it: it need not be zeroed
    requests_LNSE = flat_LTE.index_select(1, source).reshape(-1, *source_NS.shape, num_experts)
    return requests_LNSE, scored_BS.reshape(-1)[source].reshape(source_NS.shape) & real_NS


def soft_cache_misses(
    requests_LBSE: torch.Tensor,
    mask_BS: torch.Tensor,
    scored_BS: torch.Tensor,
    capacity: int,
    top_k: int,
    gamma: float = 0.9,
    cache: Cache = "plain",
    chunk: int = CHUNK,
    equal_sequences: bool = False,
) -> torch.Tensor:
    """L_cs: expected misses per layer and scored token against a soft cache of `capacity` slots (Eq. 4, 11).

        L_cs = mean over layers and scored tokens of < r(t), 1 - c(t) >

    Time counts real tokens: padding on either side neither asks nor ages the cache.

    Args:
        requests_LBSE: [..., B, S, E] r(t) of every MoE layer (straight_through_requests).
        mask_BS: [B, S] 1 for real tokens.
        scored_BS: [B, S] bool, the tokens whose misses count (scored_positions).
        capacity: C slots, at least top_k.
        gamma: how slowly the cache forgets; 0 like LRU, 1 like LFU.
        cache: what stands in the place of c(t) in the product (occupancy.py): "plain", the paper's;
            "clipped", "lru", "counts", "previous".
        equal_sequences: the mean over sequences of the mean over their scored tokens, instead of the mean
            over all scored tokens.

    Returns:
        A scalar, between 0 and K for all caches but the plain one; 0 where nothing is scored.
    """
    assert capacity >= top_k, (capacity, top_k)
    requests_LNSE, scored_NS = _caches(requests_LBSE, mask_BS, scored_BS)
    if not bool(scored_NS.any()):
        return requests_LBSE.sum() * 0.0
    held_LNSE = occupancy(requests_LNSE, cache, capacity, gamma, top_k, chunk)
    misses_LNS = (requests_LNSE * (1.0 - held_LNSE)).sum(-1)
    if equal_sequences:
        counts_N = scored_NS.sum(1)
        means_LN = (misses_LNS * scored_NS).sum(-1) / counts_N.clamp_min(1)
        return means_LN[:, counts_N > 0].mean()
    return misses_LNS[:, scored_NS].mean()


@torch.no_grad()
def simulated_misses(
    requests_LBSE: torch.Tensor, mask_BS: torch.Tensor, scored_BS: torch.Tensor, capacity: int
) -> torch.Tensor:
    """[L] experts per scored token that the runtime's default policy would not hold: a number for people.

    The C experts of the largest decayed counts are taken for resident; the policy itself (routing.policies)
    admits an expert only when it is asked for, which makes next to no difference.
    """
    requests_LNSE, scored_NS = _caches(requests_LBSE, mask_BS, scored_BS)
    if not bool(scored_NS.any()):
        return requests_LNSE.new_zeros(len(requests_LNSE))
    absent_LNSE = 1.0 - resident_by_counts(requests_LNSE, capacity)
    return (requests_LNSE * absent_LNSE).sum(-1)[:, scored_NS].mean(1)
