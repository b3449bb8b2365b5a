"""What `tune` can be told. Every setting stands here once: its name and default, what is allowed, and what it
does.

The options of the command line (cli/tune_options.py), the check of recipes and sweeps, and docs/help.md are
made from these fields. docs/log.md has the runs behind the defaults. No torch: `melinoe --help` reads this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from melinoe.config import DEFAULT_SEED, MAX_SEED, default_slots
from melinoe.errors import MelinoeError
from melinoe.sticky.settings import Stickiness
from melinoe.tuning.objectives import OBJECTIVES, Objective
from melinoe.tuning.setting_field import described, setting, under_todays_names

# Over the width of the hidden states: AdamW moves every weight by about its rate, and a sum over `width` of
# them by that many times more, so what is right at one width is right at another after division. Measured at
# 128 and 192 (docs/log.md).
LEARNING_RATE, ROUTER_LEARNING_RATE = 0.75, 0.38
MAX_RUN_TOKENS = 2**33  # of all steps, whose rows are planned before the first one

_for_recipes = partial(setting, in_recipes_only=True)  # without an option on the command line
_same_losses = partial(setting, changes_losses=False)  # an interrupted run may go on with another value


@dataclass(frozen=True)
class TuneSettings:
    """Settings of one tuning run; each stands beside what it does.

    Raises:
        MelinoeError: a value of the wrong kind or out of range, or two that contradict each other.
    """

    # ------------------------------------------------------------ what is asked for
    objective: str = setting(
        "counts",
        "What the losses hold the requests for experts against; remoe is a rival's.",
        among=tuple(OBJECTIVES),
    )
    lambda_cs: float = setting(
        None,
        "Weight of the cache simulation loss; 0 for both weights is the control.",
        "the objective's",
        least=0,
    )
    lambda_rm: float = setting(None, "Weight of the rank matching loss.", "the objective's", least=0)
    distill: float = setting(
        0.0,
        "Share of the quality term that asks for the base model's own predictions instead of the data's next"
        " token: 0.8 halves the price of locality on real text, for half as much time again per step.",
        least=0,
        most=1,
    )
    distill_prompt: bool = _for_recipes(
        True, "Ask for the base model's predictions of prompt tokens as well."
    )
    cooldown: float = setting(
        None,
        "Share of the run over which both weights fall to 0: what has become local stays so, and the answers"
        " recover.",
        "the objective's",
        least=0,
        most=1,
    )
    target_hit_rate: float | None = setting(
        None,
        "Instead of a weight: the hit rate to reach, 0.85 or 85%.",
        "none",
        above=0,
        below=1,
        is_share=True,
    )
    max_quality_loss: float | None = setting(
        None,
        "Instead of a weight: the rise of perplexity to accept, 1% or 0.01.",
        "none",
        above=0,
        is_share=True,
    )
    sticky: float = setting(
        0.0,
        "How much routing weight a token may give up to keep to the experts its sequence has asked for, while"
        " the model is tuned and from then on (docs/sticky.md); 0 is off.",
        least=0,
        most=1,
    )
    sticky_experts: int = _for_recipes(
        0, "How many experts of a layer a sequence keeps to; 0: the slots that are tuned for.", least=0
    )
    slots: int | None = setting(
        None, "Slots per layer of the cache to tune for.", "a quarter of the experts", least=1
    )
    balance: float = _for_recipes(
        0.0,
        "Price of experts that all sequences ask for, in misses per request of one that is asked for twice as"
        " often as the average: it turns concentration on one set for all into one set for each.",
        least=0,
    )
    equal_sequences: bool = _for_recipes(
        False, "Let every row weigh alike in the cache loss, instead of every decoded token."
    )
    relative: bool = _for_recipes(
        True,
        "With an objective whose gradient is that of the boundary: multiply both weights by the square root"
        " of the likelihood loss of late, and more where completions are short.",
    )
    temperature: float = _for_recipes(
        0.5, "Width of that boundary, in standard deviations of a token's router logits.", above=0
    )
    gamma: float = _for_recipes(0.9, "Forgetting of the simulated cache (Eq. 11).", least=0, most=1)
    rho: float = _for_recipes(0.1, "Margin by which the order of the experts is to hold (Eq. 12).", least=0)
    rho_per_expert: bool = _for_recipes(False, "Make that margin rho * 8 / E.")
    rank_tokens: int = _for_recipes(
        512, "Tokens per step and layer on which ranks are matched; 0 is all.", least=0
    )

    # ------------------------------------------------------------ how it is trained
    max_steps: int = setting(
        150, "Optimizer steps; the learning rate falls to 0 over them, or over the time limit.", least=1
    )
    time_limit: float | None = setting(
        None, "Stop after this many seconds.", "none", above=0, formerly="time_limit_seconds"
    )
    learning_rate: float | None = setting(
        None,
        "Learning rate of the experts' low-rank factors.",
        f"{LEARNING_RATE} / the model's width",
        least=0,
        below=1,
    )
    router_learning_rate: float | None = setting(
        None, "Learning rate of the routers.", f"{ROUTER_LEARNING_RATE} / the model's width", least=0, below=1
    )
    warmup: float = _for_recipes(0.05, "Share of the run over which the rates rise.", least=0, below=1)
    max_grad_norm: float = _for_recipes(
        1.0, "Norm that a step's gradient is cut to; 0 cuts nothing.", least=0
    )
    rank: int = setting(32, "Rank of the experts' low-rank factors.", least=1)
    alpha: float = _for_recipes(16.0, "The factors are scaled by alpha / rank.", above=0)
    batch_tokens: int = setting(2048, "Padded tokens that a process holds at once.", least=1)
    accumulate: int = _same_losses(
        1,
        "Batches per step, which count as one large batch; with --memory, several are computed together where"
        " fewer experts are read that way.",
        least=1,
    )
    max_length: int = setting(
        256, "Tokens of the longest rows; longer ones are left out, never cut.", least=2
    )
    last_turn_only: bool = setting(
        False, "Of conversations of several turns, learn the last answer alone instead of every answer."
    )
    gradient_checkpointing: bool = _same_losses(
        False, "Compute inner values again in the backward pass: less memory, a third more time."
    )
    shard: bool = _same_losses(False, "Divide the frozen weights among several processes.")
    dtype: str | None = setting(
        None,
        "Dtype of the frozen model; auto is the checkpoint's own. What is trained is float32.",
        "float32 on a CPU, auto elsewhere",
        among=("float32", "auto"),
    )
    device: str | None = _same_losses(
        None,
        "Where to compute; CUDA_VISIBLE_DEVICES picks one of several.",
        "cuda where there is one",
        among=("cpu", "cuda"),
    )
    seed: int = setting(DEFAULT_SEED, "Seed of everything random.", least=0, most=MAX_SEED)

    # ------------------------------------------------------------ what is kept and measured on the way
    eval_steps: int = _same_losses(
        0, "Every so many steps, measure loss, hit rate and loads on held-out rows; 0 is never.", least=0
    )
    eval_rows: int = _same_losses(64, "Held-out rows to measure on, at most.", least=1)
    checkpoint_steps: int = _same_losses(
        50,
        "An interrupted run goes on from the last multiple of so many steps; 0 saves nothing.",
        least=0,
        in_recipes_only=True,
    )

    def __post_init__(self) -> None:
        if self.objective in OBJECTIVES:
            for name in ("lambda_cs", "lambda_rm", "cooldown"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, getattr(self.form, name))
        for name, about in SETTINGS.items():
            about.check(getattr(self, name))
        target, loss = self.target_hit_rate, self.max_quality_loss
        if target is not None and loss is not None:
            raise MelinoeError(
                "tune: two aims are given for one weight",
                got=f"target_hit_rate {target} and max_quality_loss {loss}",
                allowed="one of them",
            )
        if not (target is None and loss is None) and self.lambda_cs == 0:
            raise MelinoeError("tune: lambda_cs is 0, and an aim is given", allowed="above 0")
        tokens = self.max_steps * self.batch_tokens * self.accumulate
        if tokens > MAX_RUN_TOKENS:
            raise MelinoeError(
                "tune: max_steps * batch_tokens * accumulate is more than a run is planned for",
                got=f"{tokens:,} tokens",
                allowed=f"up to {MAX_RUN_TOKENS:,}",
            )
        if self.batch_tokens < self.max_length:
            raise MelinoeError(
                "tune: batch_tokens is out of range",
                got=self.batch_tokens,
                allowed=f"max_length ({self.max_length}) or more",
            )

    @classmethod
    def named(cls, given: dict[str, Any], what: str = "tune") -> TuneSettings:
        """The settings that a user gave: earlier names are known too, and texts that stand for numbers.

        Args:
            what: how an error begins.

        Raises:
            MelinoeError: as TuneSettings, or a name that is no setting.
        """
        return cls(**under_todays_names(given, SETTINGS, what))

    @property
    def form(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def distills_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are needed; an aim for quality alone compares
        completions."""
        return self.distill > 0 and self.distill_prompt

    def stickiness(self, num_experts: int, top_k: int) -> Stickiness | None:
        """Of a model whose layers have `num_experts`; None is none."""
        if self.sticky == 0:
            return None
        return Stickiness(self.sticky, self.sticky_experts or self.capacity(num_experts, top_k))

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
            return default_slots(num_experts, top_k)
        if not top_k <= self.slots <= num_experts:
            raise MelinoeError(
                "tune: slots does not suit this model",
                got=self.slots,
                allowed=f"{top_k} (experts per token) .. {num_experts} (experts)",
            )
        return self.slots


SETTINGS = described(TuneSettings)
