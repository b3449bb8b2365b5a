"""What `melinoe serve` can be told, beside what `melinoe.load` takes. Each default is written here."""

from __future__ import annotations

from dataclasses import dataclass

from melinoe.errors import MelinoeError

ENGINES = ("auto", "batched", "one-at-a-time")


@dataclass(frozen=True)
class ServeSettings:
    """How a server answers and what it refuses.

    host, port: where it listens; port 0 takes a free one.
    api_key: what clients send as `Authorization: Bearer KEY`; None: no key is asked for.
    served_model_names: what clients may say as `model`; the first one is shown.
    engine: batched (continuous batching), one-at-a-time, or auto: batched where the model's family can.
    concurrency: requests that are computed together.
    queue: requests that may wait besides; whoever comes then gets 429.
    context: tokens of the longest prompt and answer together; None: the model's, at most 2048.
    cached_tokens: of the KV cache, all requests and earlier conversations together; None: four contexts.
    body_bytes: of the largest request body.
    timeout_seconds: from a request's arrival to its last token.
    drain_seconds: what running requests get to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_names: tuple[str, ...] = ("melinoe",)
    engine: str = "auto"
    concurrency: int = 8
    queue: int = 64
    context: int | None = None
    cached_tokens: int | None = None
    body_bytes: int = 2 * 2**20
    timeout_seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise MelinoeError("unknown engine", got=self.engine, allowed=", ".join(ENGINES))
        if not self.served_model_names or not all(self.served_model_names):
            raise MelinoeError("a served model needs a name", allowed="--served-model-name NAME")
        if self.api_key == "":
            raise MelinoeError("the API key is empty", allowed="some text, or no --api-key at all")
        for name, least in (
            ("concurrency", 1),
            ("queue", 0),
            ("body_bytes", 1),
            ("timeout_seconds", 0.001),
            ("drain_seconds", 0.0),
            ("context", 2),
            ("cached_tokens", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MelinoeError(f"{name} is too small", got=value, allowed=f"{least} or more")
