"""From a request to an answer: prompts, places, progress, and the numbers that are kept of them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.generation_settings import (
    AS_THE_CHECKPOINT,
    Sampling,
    end_tokens,
    of_one_answer,
    stop_strings,
)
from melinoe.serving.engine.interface import Engine
from melinoe.serving.engine.request import EngineRequest, Progress
from melinoe.serving.engine.sampling import Choice, sampler
from melinoe.serving.http.admission import Admission
from melinoe.serving.http.answer import Answer, ClientGoneError, Item
from melinoe.serving.http.answer_json import ChatJson, CompletionJson
from melinoe.serving.http.errors import ApiError, unavailable
from melinoe.serving.http.prompts import Prompts
from melinoe.serving.http.protocol import ChatRequest, CompletionRequest
from melinoe.serving.http.responses import ResponsesJson, ResponsesRequest
from melinoe.serving.http.tools import ToolCalls
from melinoe.serving.metrics import Metrics
from melinoe.serving.page.experts import ExpertEvents
from melinoe.serving.settings import ServeSettings

COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as at OpenAI
CLIENT_GONE = 499  # nobody reads it; nginx's number for the log


class Service:
    """One model behind HTTP.

    Args:
        model, tokenizer: as `melinoe.load` and `load_tokenizer` give them.
        engine: started.
        settings: bounds and names.
        metrics: counts.
    """

    def __init__(
        self, model: Any, tokenizer: Any, engine: Engine, settings: ServeSettings, metrics: Metrics
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.model, self.tokenizer = model, tokenizer
        self.created = int(time.time())
        self.admission = Admission(settings.concurrency, settings.queue)
        self.prompts = Prompts(tokenizer, model.get_input_embeddings().num_embeddings, engine.capacity)
        of_one_answer(
            model, tokenizer, 1, AS_THE_CHECKPOINT
        )  # what cannot be followed is said before clients come
        self.end_tokens = end_tokens(model.generation_config, tokenizer)
        self.stop_strings = stop_strings(model.generation_config)
        paged = getattr(model, "melinoe_paged", None)
        self.predictor = paged.predictor if paged is not None else None
        self.experts = ExpertEvents(paged.pager) if paged is not None else None
        metrics.running.set_function(lambda: self.admission.running)
        metrics.waiting.set_function(lambda: self.admission.waiting)
        metrics.healthy.set_function(lambda: float(engine.failure is None))
        metrics.cache_use.set_function(lambda: engine.cache_use)
        metrics.watch_experts(model)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check_model(body.model)
        with_logprobs = bool(body.logprobs or body.top_logprobs)
        words = ChatJson(self.tokenizer, body.model, with_logprobs)
        calls = ToolCalls.of(self.tokenizer, self.model, body) if body.tools else None
        limits = [body.max_completion_tokens, body.max_tokens]  # two names of one thing; the smaller holds
        wanted = min((limit for limit in limits if limit is not None), default=None)
        param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"

        def prompts() -> list[list[int]]:
            return [self.prompts.of_chat(body)]

        logprobs = (body.top_logprobs or 0) if with_logprobs else None
        return await self._respond(request, body, 1, prompts, (wanted, param), logprobs, words, calls)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        self._check_model(body.model)
        words = CompletionJson(self.tokenizer, body.model, body.logprobs is not None)
        given = body.prompts

        def prompts() -> list[list[int]]:
            return [
                self.prompts.of_text(prompt, "prompt")
                if isinstance(prompt, str)
                else self.prompts.of_ids(prompt, "prompt")
                for prompt in given
            ]

        wanted = (body.max_tokens or COMPLETION_TOKENS, "max_tokens")
        return await self._respond(request, body, len(given), prompts, wanted, body.logprobs, words, None)

    async def answer_response(self, body: ResponsesRequest, request: Request) -> Response:
        """POST /v1/responses."""
        self._check_model(body.model)
        chat, words = body.as_chat(), ResponsesJson(body)
        wanted = (body.max_output_tokens, "max_output_tokens")

        def prompts() -> list[list[int]]:
            return [self.prompts.of_chat(chat, "input")]

        return await self._respond(request, chat, 1, prompts, wanted, None, words, None)

    def _check_model(self, name: str) -> None:
        if name not in self.settings.served_model_names:
            names = ", ".join(self.settings.served_model_names)
            raise ApiError(
                404, f"no model {name!r} here; this server has {names}", param="model", code="model_not_found"
            )

    async def _respond(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        count: int,
        make_prompts: Callable[[], list[list[int]]],
        wanted: tuple[int | None, str],
        logprobs: int | None,
        words: ChatJson | ResponsesJson,
        calls: ToolCalls | None,
    ) -> Response:
        """wanted: tokens of the answer, and the name of the field that says so."""
        if self.engine.failure is not None:
            raise unavailable(self.engine.failure)
        arrived = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_seconds
        try:
            answer = Answer(self.engine, self.admission, count, deadline)
        except ApiError:
            self.metrics.requests.labels("rejected").inc(count)
            raise
        try:
            for ids in await asyncio.to_thread(make_prompts):
                made = await asyncio.to_thread(self._request, answer, body, ids, wanted, logprobs)
                answer.requests.append(made)
        except BaseException:
            answer.close()
            raise
        self.metrics.prompt_tokens.inc(sum(len(made.prompt) for made in answer.requests))
        answer.start(lambda: client_left(request))
        progress = self._follow(answer, arrived)
        if not body.stream:
            return await self._whole(answer, progress, words, calls)
        try:
            first = await anext(progress)  # what goes wrong before the first token has a status of its own
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        if isinstance(words, ResponsesJson):
            events = words.events(answer.requests, first, progress)
        else:
            events = self._events(answer, first, progress, words, calls, body.with_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    def _request(
        self,
        answer: Answer,
        body: ChatRequest | CompletionRequest,
        prompt: list[int],
        wanted: tuple[int | None, str],
        logprobs: int | None,
    ) -> EngineRequest:
        most = self.prompts.answer_length(prompt, *wanted)
        sampling = Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=None if body.top_k is None else max(body.top_k, 0),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
        )
        return EngineRequest(
            uuid.uuid4().hex,
            prompt,
            sampler(
                self.model,
                self.tokenizer,
                prompt,
                most,
                sampling,
                seed=body.seed,
                logprobs=logprobs,
                ignore_eos=bool(body.ignore_eos),
            ),
            AnswerText(self.tokenizer, [*self.stop_strings, *body.stops]),
            most,
            self.end_tokens,
            answer.deliver(len(answer.requests)),
            self.predictor.predict(prompt) if self.predictor is not None else None,
        )

    async def _follow(self, answer: Answer, arrived: float) -> AsyncIterator[Item]:
        """The answer's progress, counted; frees everything at its end, whatever ends it."""
        unfinished, outcome = len(answer.requests), "cancelled"
        before: dict[int, float] = {}
        try:
            async for number, progress in answer.progress():
                if number not in before:
                    self.metrics.first_token.observe(progress.at - arrived)
                tokens = len(progress.choices)
                for _ in range(tokens if number in before else tokens - 1):
                    self.metrics.per_token.observe((progress.at - before.get(number, progress.at)) / tokens)
                if tokens or number not in before:
                    before[number] = progress.at
                if progress.finish_reason is not None:
                    unfinished -= 1
                    self.metrics.requests.labels(progress.finish_reason).inc()
                yield number, progress
        except ApiError:
            outcome = "failed"
            raise
        finally:
            answer.close()
            self.metrics.requests.labels(outcome).inc(unfinished)
            self.metrics.generated_tokens.inc(sum(len(made.tokens) for made in answer.requests))
            self.metrics.cached_tokens.inc(sum(made.cached_tokens for made in answer.requests if made.tokens))
            self.metrics.request_seconds.observe(time.perf_counter() - arrived)

    async def _whole(
        self,
        answer: Answer,
        progress: AsyncIterator[Item],
        words: ChatJson | ResponsesJson,
        calls: ToolCalls | None,
    ) -> Response:
        count = len(answer.requests)
        texts, reasons = [""] * count, [""] * count
        choices: list[list[Choice]] = [[] for _ in range(count)]
        try:
            async with aclosing(progress) as items:  # type: ignore[type-var]
                async for number, item in items:
                    texts[number] += item.text
                    choices[number] += item.choices
                    reasons[number] = item.finish_reason or reasons[number]
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        contents = [words.content(text, chosen) for text, chosen in zip(texts, choices, strict=True)]
        if calls is not None:
            contents[0]["message"], reasons[0] = calls.message(answer.requests[0], texts[0], reasons[0])
        return JSONResponse(words.answer(contents, answer.requests, reasons))

    async def _events(
        self,
        answer: Answer,
        first: Item,
        progress: AsyncIterator[Item],
        words: ChatJson,
        calls: ToolCalls | None,
        with_usage: bool,
    ) -> AsyncIterator[str]:
        """Server-sent events. A message that may hold calls of tools comes whole, at its end."""
        shown = [0] * len(answer.requests)
        text = ""

        def chunks(number: int, item: Progress) -> list[dict[str, Any]]:
            nonlocal text
            if calls is not None:
                text += item.text
                if item.finish_reason is None:
                    return []
                return [words.calls(number, *calls.message(answer.requests[0], text, item.finish_reason))]
            if not (item.text or item.choices or item.finish_reason):
                return []
            piece = words.chunk(number, item, shown[number])
            shown[number] += len(item.text)
            return [piece]

        def written(chunk: dict[str, Any]) -> str:
            return _event({**chunk, "usage": None} if with_usage and "usage" not in chunk else chunk)

        try:
            async with aclosing(progress) as items:  # type: ignore[type-var]
                if type(words) is ChatJson and calls is None:
                    yield written(words.begin(0))
                for chunk in chunks(*first):
                    yield written(chunk)
                async for item in items:
                    for chunk in chunks(*item):
                        yield written(chunk)
        except ApiError as error:
            yield _event(error.body())
        except ClientGoneError:
            return
        else:
            if with_usage:
                yield written(words.end(answer.requests))
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def client_left(request: Request) -> None:
    """Returns when the connection is closed; the body has been read by now."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
