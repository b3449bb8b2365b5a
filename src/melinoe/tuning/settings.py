"""What `tune` can be told. Every default is written here, once; docs/log.md has the runs behind them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from melinoe.config import DEFAULT_SEED
from melinoe.errors import MelinoeError
from melinoe.losses.occupancy import Cache


@dataclass(frozen=True)
class Objective:
    """What `--objective NAME` stands for.

    cache: what the requests are held against (occupancy.py).
    gradient: the way back through r(t): "probabilities", p_f as in the paper, or "boundary", near the K-th
    choice. lambda_cs, lambda_rm: weights where none are given.
    anchor: what keeps the router near the base's: "ranks", the paper's loss, or "divergence", KL(p_b, p_f).
    experts: whether the experts' low-rank factors are trained besides the routers.
    cooldown: share of the run over which the weights fall to nothing, where none is given.
    """

    cache: Cache
    gradient: Literal["probabilities", "boundary"]
    lambda_cs: float
    lambda_rm: float
    anchor: Literal["ranks", "divergence"] = "ranks"
    experts: bool = True
    cooldown: float = 0.5


# docs/results.md has the frontier of each; the weights of the first are the paper's
OBJECTIVES: dict[str, Objective] = {
    "paper": Objective("plain", "probabilities", 0.5, 0.1, cooldown=0.0),
    "clipped": Objective("clipped", "probabilities", 1.0, 0.1),
    "boundary": Objective("clipped", "boundary", 0.045, 0.02),
    "lru": Objective("lru", "boundary", 0.045, 0.02),
    "counts": Objective("counts", "boundary", 0.045, 0.006),
    # the rival of arXiv 2605.27081, re-implemented from its description: only the routers move
    "remoe": Objective("previous", "probabilities", 1.0, 0.1, "divergence", experts=False, cooldown=0.0),
}


# Over the width of the hidden states: AdamW moves every weight by about its rate, and a sum over `width` of
# them by that many times more, so what is right at one width is right at another after division. Measured at
# 128 and 192 (docs/log.md).
LEARNING_RATE, ROUTER_LEARNING_RATE = 0.75, 0.38


@dataclass(frozen=True)
class TuneSettings:
    """Settings of one tuning run.

    max_steps: optimizer steps. The learning rate falls to zero over them (or over the time limit).
    lambda_cs, lambda_rm: weights of the cache simulation and the rank matching loss (Eq. 6); both 0 is
        the control, the same fine-tune without locality.
    objective: a name of OBJECTIVES; "paper" is Eq. 4 and 5 as printed.
    distill: 0 .. 1, share of the quality term that asks for the base model's own next-token distribution
    instead of
        the data's next token; distill_prompt: on the prompt's tokens as well.
    ramp, cooldown: the weights rise in a straight line over the first share of the run, and fall to nothing
    over the
        last (None: as the objective has it): what has become local stays so, and the answers recover.
    balance: price on experts that all sequences ask for, in misses per request of one that is asked twice as
    often as
        the average; it turns concentration on one set for all into one set for each.
    target_hit_rate, max_quality_loss: what is wanted or may be paid (0.01: one percent of perplexity),
    instead of a
        weight: lambda_cs is multiplied by a factor that control.py moves. One of the two.
    relative: with the boundary gradient, multiply both weights by the square root of the likelihood loss of
    late, and more
        where completions are short (losses.SCORED_TOKENS).
    temperature: width of that boundary, in standard deviations of a token's logits.
    slots: capacity C of the simulated cache per layer; None is max(K, E / 4).
    gamma, rho: forgetting of the cache (Eq. 11), margin of the ranking (Eq. 12); with rho_per_expert the
        margin is rho * 8 / E.
    rank_form: "sum" over pairs as in the paper, or "mean", whose weight carries over between models.
    rank_tokens: tokens per step and layer on which ranks are matched (0: all).
    learning_rate, router_learning_rate: of the experts' factors and of the routers (AdamW); None:
    LEARNING_RATE and
        ROUTER_LEARNING_RATE over the model's width.
    rank, alpha: of the experts' low-rank factors.
    batch_tokens: padded tokens that a process holds at once; max_length: longer rows are left out.
    accumulate: such batches per step and process. A step has batch_tokens * accumulate * processes, and its
    losses and
        gradients are those of one batch of that size.
    gradient_checkpointing: compute each layer's inner values again in the backward pass instead of keeping
    them. shard: divide the frozen weights among the processes instead of holding all of them in each.
    eval_steps: every so many steps, and at the start and the end, measure on held-out rows (0: never);
    eval_rows: at
        most so many of them.
    time_limit_seconds: stop after this long, the schedule stretched to it.
    checkpoint_steps: an interrupted run resumes from the last multiple (0: never saved).
    detach_cache: no gradient through past requests (an ablation).
    dtype: "float32", or "auto" for the checkpoint's own; None is float32 on a CPU, "auto" elsewhere. What is
        trained is always float32.
    """

    max_steps: int = 150
    seed: int = DEFAULT_SEED
    lambda_cs: float = None  # type: ignore[assignment]  # set below, never None afterwards
    lambda_rm: float = None  # type: ignore[assignment]
    objective: str = "counts"
    distill: float = 0.0
    distill_prompt: bool = True
    ramp: float = 0.0
    cooldown: float = None  # type: ignore[assignment]
    balance: float = 0.0
    target_hit_rate: float | None = None
    max_quality_loss: float | None = None
    relative: bool = True
    slots: int | None = None
    gamma: float = 0.9
    rho: float = 0.1
    temperature: float = 0.5
    rho_per_expert: bool = False
    rank_form: Literal["sum", "mean"] = "sum"
    rank_tokens: int = 512
    learning_rate: float | None = None
    router_learning_rate: float | None = None
    rank: int = 32
    alpha: float = 16.0
    batch_tokens: int = 2048
    max_length: int = 256
    accumulate: int = 1
    gradient_checkpointing: bool = False
    shard: bool = False
    eval_steps: int = 0
    eval_rows: int = 64
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    time_limit_seconds: float | None = None
    checkpoint_steps: int = 50
    detach_cache: bool = False
    device: str | None = None
    dtype: Literal["float32", "auto"] | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise MelinoeError("tune: unknown objective", got=self.objective, allowed=" | ".join(OBJECTIVES))
        for name in ("lambda_cs", "lambda_rm", "cooldown"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.form, name))

        def check(right: bool, name: str, allowed: str) -> None:
            if not right:
                raise MelinoeError(f"tune: {name} is out of range", got=getattr(self, name), allowed=allowed)

        for name in (
            "max_steps",
            "rank",
            "batch_tokens",
            "max_length",
            "alpha",
            "accumulate",
            "eval_rows",
        ):
            check(getattr(self, name) > 0, name, "above 0")
        for name in (
            "lambda_cs",
            "lambda_rm",
            "rho",
            "rank_tokens",
            "balance",
            "max_grad_norm",
            "checkpoint_steps",
            "eval_steps",
        ):
            check(0 <= getattr(self, name) < float("inf"), name, "0 or more")
        for name in ("learning_rate", "router_learning_rate"):
            check(getattr(self, name) is None or 0 <= getattr(self, name) < 1, name, "0 .. 1")
        check(self.temperature > 0, "temperature", "above 0")
        check(0 <= self.gamma <= 1, "gamma", "0 .. 1")
        check(0 <= self.warmup < 1, "warmup", "0 .. 1")
        check(0 <= self.distill <= 1, "distill", "0 .. 1")
        check(0 <= self.ramp <= 1, "ramp", "0 .. 1")
        check(0 <= self.cooldown <= 1, "cooldown", "0 .. 1")
        target, loss = self.target_hit_rate, self.max_quality_loss
        check(target is None or 0 < target < 1, "target_hit_rate", "between 0 and 1")
        check(loss is None or 0 < loss < float("inf"), "max_quality_loss", "above 0 (0.01 is one percent)")
        if target is not None and loss is not None:
            raise MelinoeError(
                "tune: two aims for one weight",
                got=f"target_hit_rate {target} and max_quality_loss {loss}",
                allowed="one of them",
            )
        steered = target is not None or loss is not None
        check(not steered or self.lambda_cs > 0, "lambda_cs", "above 0 where an aim is given")
        check(self.rank_form in ("sum", "mean"), "rank_form", "sum | mean")
        check(self.dtype in (None, "float32", "auto"), "dtype", "float32 | auto")
        check(self.device in (None, "cpu", "cuda"), "device", "cpu | cuda (CUDA_VISIBLE_DEVICES picks one)")
        check(self.slots is None or self.slots > 0, "slots", "1 or more")
        check(self.time_limit_seconds is None or self.time_limit_seconds > 0, "time_limit_seconds", "above 0")
        check(self.batch_tokens >= self.max_length, "batch_tokens", f"max_length ({self.max_length}) or more")

    @property
    def form(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def distills_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are needed.

        An aim for quality alone compares completions.
        """
        return self.distill > 0 and self.distill_prompt

    def schedule(self, done: float) -> float:
        """What both weights are multiplied by when the share `done` of the run is over, 0 .. 1."""
        rise = min(1.0, done / self.ramp) if self.ramp else 1.0
        fall = min(1.0, (1 - done) / self.cooldown) if self.cooldown else 1.0
        return rise * fall

    def learning_rates(self, width: int) -> tuple[float, float]:
        """(of the experts' factors, of the routers) for a model whose hidden states have `width` entries."""
        rate, router_rate = self.learning_rate, self.router_learning_rate
        return (
            LEARNING_RATE / width if rate is None else rate,
            ROUTER_LEARNING_RATE / width if router_rate is None else router_rate,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def capacity(self, num_experts: int, top_k: int) -> int:
        """C of a layer with `num_experts`: never fewer slots than one token asks for.

        Raises:
            MelinoeError: `slots` is below K or above E.
        """
        if self.slots is None:
            return min(num_experts, max(top_k, num_experts // 4))
        if not top_k <= self.slots <= num_experts:
            raise MelinoeError(
                "tune: slots does not suit this model",
                got=self.slots,
                allowed=f"{top_k} (experts per token) .. {num_experts} (experts)",
            )
        return self.slots
