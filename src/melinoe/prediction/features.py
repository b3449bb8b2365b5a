"""What the predictor sees of a prompt: the backbone's own embedding table, and no second model.

The paper embeds the prompt with a sentence encoder of its own. The tokens' embeddings of the model that
is about to run are there already and cost one look-up; a few averages of them tell prompts of different
tasks apart, which is what decides the experts.
"""

from __future__ import annotations

import math

import torch

MAX_WIDTH = 256  # wider embeddings are projected, so that a predictor file stays small beside the model
LAST_TOKENS, FIRST_TOKENS, TEMPLATE_TOKENS = 8, 8, 1


def token_table(embeddings: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The embedding table that goes into the predictor's file.

    Args:
        embeddings: [V, H] of the backbone.
        seed: of the random projection, where H > 256.

    Returns:
        [V, D] float16 with values of order 1; D = min(H, 256).
    """
    table = embeddings.detach().to("cpu", torch.float32)
    if table.shape[1] > MAX_WIDTH:
        generator = torch.Generator().manual_seed(seed)
        table = (
            table @ torch.randn(table.shape[1], MAX_WIDTH, generator=generator) / math.sqrt(table.shape[1])
        )
    return (table / table.std().clamp_min(1e-12)).to(torch.float16)


def num_features(width: int) -> int:
    """F, from the width D of the token table."""
    return 5 * width + 1


def prompt_features(table: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    """[F] float32: mean and spread of the prompt's tokens, its first and last tokens, its length.

    Args:
        table: [V, D] from `token_table`.
        token_ids: of the prompt, chat template included; at least one.
    """
    tokens = table[torch.tensor(token_ids)].float()  # [P, D]
    # the template's closing tokens are the same in every prompt; what stands before them is the question
    body = tokens[:-TEMPLATE_TOKENS] if len(tokens) > TEMPLATE_TOKENS else tokens
    parts = [
        tokens.mean(0),
        tokens.std(0, correction=0),
        tokens[:FIRST_TOKENS].mean(0),
        body[-LAST_TOKENS:].mean(0),
        body[-2:].mean(0),
        torch.tensor([math.log(len(tokens))]),
    ]
    return torch.cat(parts)
