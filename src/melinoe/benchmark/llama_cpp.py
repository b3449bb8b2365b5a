"""llama.cpp in this process, through the wheel xllamacpp: token ids in, token ids and times out.

One sequence at a time, greedy. The file is mapped, as llama.cpp does by itself: what it has touched is page
cache, which counts in a memory cgroup.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError


def available() -> bool:
    """Whether the wheel is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


@dataclass(frozen=True)
class Answer:
    """One request: its tokens, seconds since it began at which each came, and what was watched then."""

    tokens: list[int]
    times: list[float]
    watched: list[int]


class LlamaCpp:
    """A GGUF file, opened.

    Args:
        path: of the file.
        context: tokens of prompt and answer together, at most.
        threads: for prompts and for decoding.
        repack: weights laid out anew in memory of their own, where the format has a faster layout. They are
            no longer page cache then: only where all of them fit.
        exact: attention as written, in float32, instead of llama.cpp's faster one, which rounds keys and
            values to float16: then a file in f32 gives the tokens of transformers in float32.
    """

    def __init__(
        self, path: str | Path, context: int = 512, threads: int = 1, repack: bool = True, exact: bool = False
    ) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.n_ctx, given.n_parallel = context, 1
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        given.warmup = False  # it would read every expert
        given.no_extra_bufts = not repack
        given.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        if exact:
            given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        given.cache_ram_mib = 0  # prompts of before are not kept
        given.fit_params = False
        given.verbosity = -1
        self._server = xllamacpp.Server(given)

    def close(self) -> None:
        """Ends its threads and lets go of the file."""
        del self._server

    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        ends: list[int] | None = None,
        seconds: float = math.inf,
        watch: Callable[[], int] = lambda: 0,
    ) -> Answer:
        """Greedy, exactly `new_tokens` tokens, as our own measurements have it.

        Args:
            ends: tokens that are never chosen.
            seconds: no token behind these, but two at least.
            watch: a counter that is read with each token.
        """
        tokens: list[int] = []
        times: list[float] = []
        watched: list[int] = []
        began = time.perf_counter()

        def came(piece: Any) -> bool:
            for one in piece if isinstance(piece, list) else [piece]:
                if "choices" not in one:
                    raise MelinoeError("llama.cpp refused a request", got=str(one)[:300])
                found = (one["choices"][0].get("logprobs") or {}).get("content") or []
                tokens.extend(token["id"] for token in found)
                times.extend([time.perf_counter() - began] * len(found))
                watched.extend([watch()] * len(found))
            return len(times) > 1 and times[-1] > seconds

        request = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "stream": True,
            "logprobs": 1,  # of the one token that is left, which costs nothing: ids are told with them
            "post_sampling_probs": True,
            "cache_prompt": False,
            "logit_bias": [[end, False] for end in ends or []],
        }
        self._server.handle_completions(request, came)
        return Answer(tokens, times, watched)
