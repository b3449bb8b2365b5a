"""The network that scores experts from a prompt, and its file (one safetensors file, no pickle)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.files import whole_file
from melinoe.models.layers import fingerprint as model_fingerprint
from melinoe.outputs import tensor_file
from melinoe.prediction.features import num_features, prompt_features
from melinoe.routing.policies import Strength, mean_strength

FORMAT, VERSION = "melinoe-predictor", "2"
READABLE = ("1", VERSION)  # 1: one horizon for all, any prompt familiar
PREDICTOR = tensor_file("a predictor", FORMAT)


Prediction = tuple[np.ndarray, Strength]  # scores [L, E] of a prompt, and what they are worth


def mean_prediction(predictions: Sequence[Prediction]) -> Prediction:
    """That of several prompts together."""
    scores = np.mean([scores for scores, _ in predictions], axis=0)
    return scores, mean_strength([strength for _, strength in predictions])


class Predictor(nn.Module):
    """Prompt features -> requests per decoded token of every (layer, expert).

    Args:
        table: [V, D] of `token_table`.
        num_layers, num_experts, experts_per_token: L, E, K of the model.
        hidden: width of the one hidden layer.
        fingerprint: of the model whose trace it was fitted to.

    `strength` says what a prediction is worth: it goes to `Policy.begin` with the scores. Its horizon is that
    of the mean sequence; `predict` has one for each prompt, the length that answers to such prompts have, and
    for a prompt that looks like none that was seen the prediction is worth less, down to nothing.
    """

    def __init__(
        self,
        table: torch.Tensor,
        num_layers: int,
        num_experts: int,
        experts_per_token: int,
        hidden: int = 256,
        fingerprint: str = "",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        width = num_features(table.shape[1])
        self.num_layers, self.num_experts, self.experts_per_token = num_layers, num_experts, experts_per_token
        self.fingerprint = fingerprint
        self.origin: dict[str, Any] = {}  # `Trace.origin` of what it was fitted to
        self.strength = Strength()
        self.table: torch.Tensor
        self.mean: torch.Tensor
        self.deviation: torch.Tensor
        self.register_buffer("table", table)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.length: torch.Tensor  # of log(1 + decoded tokens) on the features and 1; zeros: not known
        self.register_buffer("length", torch.zeros(width + 1))
        self.longest = 0.0  # decoded tokens of the longest sequence that it was fitted to
        self.familiar = math.inf  # strangeness up to which a prompt is one of those that were seen
        self.inner = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, num_layers * num_experts)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, F] -> [B, L, E] logarithm of the share of each layer's requests."""
        inner = nn.functional.gelu(self.inner((features - self.mean) / self.deviation))
        logits = self.outer(self.dropout(inner)).view(-1, self.num_layers, self.num_experts)
        return logits.log_softmax(-1)

    def scores(self, token_ids: list[int]) -> np.ndarray:
        """[L, E] float64: predicted requests per decoded token; each layer sums to K.

        Args:
            token_ids: of the prompt, as `data.encode_prompt` gives them; at least one.
        """
        return self.predict(token_ids)[0]

    @torch.no_grad()
    def predict(self, token_ids: list[int]) -> Prediction:
        """(`scores`, what they are worth for this prompt)."""
        training, _ = self.training, self.eval()
        features = prompt_features(self.table, token_ids)
        shares = self(features[None])[0].exp()
        self.train(training)
        return self.experts_per_token * shares.double().numpy(), self._strength_of(features)

    def predict_all(self, prompts: list[list[int]]) -> tuple[np.ndarray, list[Strength]]:
        """([S, L, E], a strength for each prompt), as `simulate` takes them."""
        found = [self.predict(prompt) for prompt in prompts]
        return np.stack([scores for scores, _ in found]), [strength for _, strength in found]

    def strangeness(self, features: torch.Tensor) -> torch.Tensor:
        """[...] how unlike a prompt is to those that were seen: the mean square of its standardised features,
        [..., F], which is 1 for the mean of these."""
        return ((features - self.mean) / self.deviation).square().mean(-1)

    def _strength_of(self, features: torch.Tensor) -> Strength:
        """The horizon is the expected length: at least a token, at most the longest that was seen. A prompt
        twice as strange as what is familiar is worth nothing."""
        horizon, trust = self.strength.horizon, 2 - float(self.strangeness(features)) / self.familiar
        if self.longest:
            known = torch.cat([(features - self.mean) / self.deviation, torch.ones(1)])
            horizon = max(1.0, math.expm1(min(float(known @ self.length), math.log1p(self.longest))))
        return Strength(self.strength.tokens * min(max(trust, 0.0), 1.0), horizon)

    @torch.no_grad()
    def forget_prompts(self, shares: torch.Tensor) -> None:
        """Predicts the same for every prompt from now on.

        Args:
            shares: [L, E] of each layer's requests.
        """
        self.outer.weight.zero_()
        self.outer.bias.copy_(shares.clamp_min(1e-5).log().flatten())

    def save(
        self, path: str | Path, report: dict[str, Any] | None = None, check: Callable[[], None] | None = None
    ) -> Path:
        """Writes one safetensors file, whole or not at all. check: whether it may be replaced, asked last."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "experts_per_token": str(self.experts_per_token),
            "num_layers": str(self.num_layers),
            "prior_tokens": repr(self.strength.tokens),
            "horizon": repr(self.strength.horizon),
            "longest": repr(self.longest),
            "familiar": repr(self.familiar),
            "origin": json.dumps(self.origin, sort_keys=True),
            "report": json.dumps(report or {}, sort_keys=True),
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with whole_file(path, check) as partial:
            save_file(tensors, partial, metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Predictor:
        """Reads a predictor.

        Args:
            model: the model it is for, or its fingerprint; None: not compared.

        Raises:
            MelinoeError: no such file, not a predictor, of another version or for another model.
        """
        path = Path(path)
        if not path.is_file():
            raise MelinoeError(
                "no such predictor file", got=path, next_step="make one with: melinoe fit-predictor"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    found = metadata.get("format", "no format")
                    raise MelinoeError(f"{path} is not a predictor", got=found, allowed=FORMAT)
                if metadata.get("version") not in READABLE:
                    found = metadata.get("version")
                    raise MelinoeError(f"{path}: predictor of another version", got=found, allowed=VERSION)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise MelinoeError(f"{path} is not a predictor file", got=str(error)) from None
        if model is not None:
            check_same_model(str(path), metadata["fingerprint"], model)
        num_layers, hidden = int(metadata["num_layers"]), len(tensors["inner.bias"])
        num_experts = len(tensors["outer.bias"]) // num_layers
        predictor = cls(
            tensors["table"],
            num_layers,
            num_experts,
            int(metadata["experts_per_token"]),
            hidden,
            metadata["fingerprint"],
        )
        horizon = float(metadata.get("horizon", "inf"))  # older files know none
        predictor.strength = Strength(float(metadata["prior_tokens"]), horizon)
        predictor.origin = json.loads(metadata.get("origin", "{}"))
        predictor.longest = float(metadata.get("longest", 0.0))
        predictor.familiar = float(metadata.get("familiar", "inf"))
        tensors.setdefault("length", predictor.length)
        predictor.load_state_dict(tensors)
        return predictor.eval()


def check_same_model(what: str, found: str, model: Any) -> None:
    """Refuses what was made from another model.

    Args:
        model: the model or its fingerprint.
    """
    expected = model if isinstance(model, str) else model_fingerprint(model)
    if found != expected:
        raise MelinoeError(
            f"{what} was made from a model with other routers",
            got=found,
            allowed=expected,
            next_step="trace this model (with its adapter) and fit the predictor again",
        )
