"""A trace: which experts every token of a set of sequences asked for, call by call.

Traces stand between a model and everything that only needs to know what it asked: the simulator
replays them, the predictor learns from them. A call is one forward pass; its boundaries and its phase
are kept, because a prompt of fifty tokens in one call and fifty decoded tokens load different things.

The file is one safetensors file (format `melinoe-trace`, version 1); the arrays below are its tensors,
everything else is JSON in its metadata. Numpy only: a trace is read without torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from melinoe.errors import MelinoeError
from melinoe.files import whole_file
from melinoe.outputs import tensor_file
from melinoe.routing.policies import DECODE, PREFILL, Call

FORMAT, VERSION = "melinoe-trace", "1"
TRACE = tensor_file("a trace", FORMAT)
ORIGIN = ("sticky", "adapter", "identity")  # names in the settings
PHASES = (PREFILL, DECODE)  # call_phase holds positions in this tuple
_ARRAYS = {
    "indices": np.int16,
    "call_offsets": np.int64,
    "call_phase": np.uint8,
    "sequence": np.int32,
    "ages": np.int32,
    "valid": np.bool_,
    "token_ids": np.int32,
    "prompt_lengths": np.int32,
}


@dataclass(frozen=True)
class Trace:
    """N tokens over C calls, L MoE layers, K experts per token, S sequences.

    indices: [N, L, K] experts asked for, in program order; ids >= num_experts are sentinels.
    call_offsets: [C + 1] call c holds the tokens call_offsets[c] .. call_offsets[c + 1] - 1.
    call_phase: [C] 0 prefill, 1 decode.
    sequence: [N] the sequence of each token, 0 .. S - 1.
    ages: [N] 0 for the last token of its sequence in its call, 1 for the one before, ...
    valid: [N] False for padding.
    token_ids: [N] the token that was fed.
    prompt_lengths: [S] tokens of each prompt.
    num_experts: E.  fingerprint: `moe.fingerprint` of the model.  model: its name, for people.
    settings: how the trace was made; of the model "sticky" (its settings, or None), "adapter" (a folder, or
        None) and "identity" (melinoe.models.identity), which older files lack.
    """

    indices: np.ndarray
    call_offsets: np.ndarray
    call_phase: np.ndarray
    sequence: np.ndarray
    ages: np.ndarray
    valid: np.ndarray
    token_ids: np.ndarray
    prompt_lengths: np.ndarray
    num_experts: int
    fingerprint: str = ""
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _ARRAYS.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        tokens, calls = len(self.indices), len(self.call_phase)
        per_token = {len(getattr(self, name)) for name in ("sequence", "ages", "valid", "token_ids")}
        sound = (
            self.indices.ndim == 3
            and per_token == {tokens}
            and len(self.call_offsets) == calls + 1
            and self.call_offsets[0] == 0
            and self.call_offsets[-1] == tokens
            and bool((np.diff(self.call_offsets) > 0).all())
            and (tokens == 0 or int(self.sequence.max()) < len(self.prompt_lengths))
        )
        if not sound:
            raise MelinoeError("the arrays of a trace do not fit each other", got=self._shapes())

    def _shapes(self) -> str:
        return ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in _ARRAYS)

    @property
    def num_layers(self) -> int:
        return self.indices.shape[1]

    @property
    def origin(self) -> dict[str, Any]:
        """What is known of the model beside its fingerprint; what is made of the trace keeps it."""
        return {name: self.settings[name] for name in ORIGIN if name in self.settings}

    @property
    def made_by(self) -> str:
        """The model, how sticky it was and its adapter, for people."""
        name, origin = self.model or "a model without a name", self.origin
        if "sticky" not in origin:
            return f"{name} (how sticky it was is not written down)"
        adapter = f" with the adapter {origin['adapter']}" if origin.get("adapter") else ""
        return f"{name} at stickiness {strength_in_words(origin['sticky'])}{adapter}"

    @property
    def num_calls(self) -> int:
        return len(self.call_phase)

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def decoded(self) -> np.ndarray:
        """[N] True for the tokens of decode calls, padding excluded."""
        return np.repeat(self.call_phase == 1, np.diff(self.call_offsets)) & self.valid

    @cached_property
    def _before_answers(self) -> np.ndarray:
        """[N] True for the first prompt_lengths tokens of each sequence, padding not counted."""
        tokens = np.flatnonzero(self.valid)
        sequence = self.sequence[tokens]
        counts = np.bincount(sequence, minlength=self.num_sequences)
        place = np.empty(len(tokens), np.int64)  # of each token in its sequence
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        place[np.argsort(sequence, kind="stable")] = np.arange(len(tokens)) - starts
        before = np.zeros(len(self.valid), bool)
        before[tokens] = place < self.prompt_lengths[sequence]
        return before

    def _tokens_of(self, phase: str) -> np.ndarray:
        """[N] True for the tokens that decoding fed, or for those of the prompts."""
        return self.decoded if phase == DECODE else self.valid & ~self.decoded & self._before_answers

    @cached_property
    def begins(self) -> np.ndarray:
        """[C] True where a sequence appears for the first time: a new request starts there."""
        _, first_token = np.unique(self.sequence, return_index=True)
        begins = np.zeros(self.num_calls, bool)
        begins[np.searchsorted(self.call_offsets, first_token, side="right") - 1] = True
        return begins

    def calls(self) -> Iterator[tuple[int, int, Call]]:
        """(call, layer, what the policy is asked) in program order: all layers, then the next call."""
        for call in range(self.num_calls):
            tokens = slice(self.call_offsets[call], self.call_offsets[call + 1])
            phase, ages, valid = PHASES[self.call_phase[call]], self.ages[tokens], self.valid[tokens]
            by_layer = self.indices[tokens]
            for layer in range(self.num_layers):
                yield call, layer, Call(by_layer[:, layer], ages, valid, phase)

    def prompts(self) -> list[list[int]]:
        """Token ids of each sequence's prompt: what is read before its first decoded token."""
        ids: list[list[int]] = [[] for _ in range(self.num_sequences)]
        prompt = self._tokens_of(PREFILL)
        for sequence, token in zip(
            self.sequence[prompt].tolist(), self.token_ids[prompt].tolist(), strict=True
        ):
            ids[sequence].append(token)
        return ids

    def request_counts(self, phase: str) -> np.ndarray:
        """[S, L, E] float32: how many tokens of each sequence asked for each expert in one phase.

        Prefill is the prompt before the first answer: what is known when decoding begins.
        """
        tokens = self._tokens_of(phase)
        chosen = self.indices[tokens].astype(np.int64)  # [n, L, K]
        rows = self.sequence[tokens].astype(np.int64)[:, None, None] * self.num_layers
        width = self.num_experts + 1  # the last column takes sentinels
        cells = (rows + np.arange(self.num_layers)[:, None]) * width + chosen.clip(max=self.num_experts)
        counts = np.bincount(cells.ravel(), minlength=self.num_sequences * self.num_layers * width)
        return counts.reshape(self.num_sequences, self.num_layers, width)[..., :-1].astype(np.float32)

    def frequencies(self, phase: str = DECODE) -> np.ndarray:
        """[S, L, E] float32: requests per token of a phase; each layer sums to K (0 without such tokens)."""
        tokens = self._tokens_of(phase)
        lengths = np.bincount(self.sequence[tokens], minlength=self.num_sequences)
        return self.request_counts(phase) / np.maximum(lengths, 1)[:, None, None].astype(np.float32)

    def only(self, sequences: Sequence[int] | np.ndarray) -> Trace:
        """The calls of these sequences alone, in the order in which they were made.

        Args:
            sequences: which to keep; they are numbered anew, in ascending order.
        """
        kept = np.unique(np.asarray(sequences, np.int64))
        number = np.full(self.num_sequences, -1, np.int64)
        number[kept] = np.arange(len(kept))
        tokens = number[self.sequence] >= 0
        sizes: Any = (
            np.add.reduceat(tokens.astype(np.int64), self.call_offsets[:-1]) if self.num_calls else []
        )
        sizes = np.asarray(sizes, np.int64)
        per_token: dict[str, Any] = {
            name: getattr(self, name)[tokens] for name in ("indices", "ages", "valid", "token_ids")
        }
        return replace(
            self,
            **per_token,
            sequence=number[self.sequence[tokens]],
            call_offsets=np.concatenate([[0], np.cumsum(sizes[sizes > 0])]),
            call_phase=self.call_phase[sizes > 0],
            prompt_lengths=self.prompt_lengths[kept],
        )

    def save(self, path: str | Path, check: Callable[[], None] | None = None) -> Path:
        """Writes the file, whole or not at all. check: whether it may be replaced, asked last."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "num_experts": str(self.num_experts),
            "settings": json.dumps(self.settings, sort_keys=True),
        }
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        with whole_file(path, check) as partial:
            _write(partial, tensors, metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads a trace file.

        Raises:
            MelinoeError: no such file, not a trace, or of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise MelinoeError("no such trace file", got=path, next_step="make one with: melinoe trace")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise MelinoeError(
                        f"{path} is not a trace", got=metadata.get("format", "no format"), allowed=FORMAT
                    )
                if metadata.get("version") != VERSION:
                    raise MelinoeError(
                        f"{path}: trace of another version",
                        got=metadata.get("version"),
                        allowed=VERSION,
                        next_step="make it again with: melinoe trace",
                    )
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except SafetensorError as error:
            raise MelinoeError(f"{path} is not a trace file", got=str(error)) from None
        return cls(
            **arrays,
            num_experts=int(metadata["num_experts"]),
            fingerprint=metadata["fingerprint"],
            model=metadata["model"],
            settings=json.loads(metadata["settings"]),
        )


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A safetensors file, one array at a time: the library's own writer holds all of it in memory once more.

    Larger elements stand first, so that each array begins at a multiple of its element.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    ordered, place = sorted(tensors.items(), key=lambda item: -item[1].itemsize), 0
    for name, array in ordered:
        kind = {"b": "BOOL", "u": "U8"}.get(array.dtype.kind) or f"I{8 * array.itemsize}"
        header[name] = {
            "dtype": kind, "shape": list(array.shape), "data_offsets": [place, place + array.nbytes],
        }  # fmt: skip
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(array.reshape(-1).view(np.uint8).data)


def _one_behind_the_other(parts: list[np.ndarray]) -> np.ndarray:
    """All parts as one array: without a copy where they are one already, which may be larger than memory."""
    whole = parts[0].base if parts else None
    if not isinstance(whole, np.ndarray) or whole.nbytes != sum(part.nbytes for part in parts):
        return np.concatenate(parts)
    place = _address(whole)
    for part in parts:
        if part.base is not whole or part.dtype != whole.dtype or _address(part) != place:
            return np.concatenate(parts)
        place += part.nbytes
    return whole if whole.shape[1:] == parts[0].shape[1:] else np.concatenate(parts)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def as_trace(trace: Trace | str | Path) -> Trace:
    """The trace itself, or the one in a file."""
    return trace if isinstance(trace, Trace) else Trace.load(trace)


def strength_in_words(sticky: Any) -> str:
    """Of a stickiness as files hold it: a strength, a mapping (without a unit: in logits), or None."""
    given = sticky if isinstance(sticky, Mapping) else {"strength": sticky or 0, "unit": "share"}
    strength = given.get("strength") or 0
    return f"{strength:g}" + (" in logits" if strength and given.get("unit", "logit") == "logit" else "")


def joined(traces: Sequence[Trace]) -> Trace:
    """Traces of one model behind each other, sequences numbered on.

    Raises:
        MelinoeError: traces of different models, or at different strengths.
    """
    first = traces[0]
    for other in traces[1:]:
        if (other.fingerprint, other.num_experts) != (first.fingerprint, first.num_experts):
            raise MelinoeError(
                "the traces are of different models", got=other.fingerprint, allowed=first.fingerprint
            )
        one, two = first.origin, other.origin
        if any(one[name] != two[name] for name in ("sticky", "identity") if name in one and name in two):
            raise MelinoeError(
                "the traces are of different models", got=other.made_by, allowed=f"{first.made_by}, unchanged"
            )
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(trace, name) for trace in traces]) for name in _ARRAYS
    }
    sequences = np.cumsum([0, *(trace.num_sequences for trace in traces)])
    tokens = np.cumsum([0, *(len(trace.indices) for trace in traces)])
    arrays["sequence"] = np.concatenate(
        [trace.sequence + start for trace, start in zip(traces, sequences[:-1], strict=True)]
    )
    offsets = [trace.call_offsets[1:] + start for trace, start in zip(traces, tokens[:-1], strict=True)]
    arrays["call_offsets"] = np.concatenate([[0], *offsets])
    return replace(first, **arrays)


def from_sequences(
    indices: list[np.ndarray],
    token_ids: list[list[int]],
    prompt_lengths: Sequence[int | Sequence[tuple[int, int]]],
    num_experts: int,
    **identity: Any,
) -> Trace:
    """The trace of unpadded sequences that were read whole (teacher-forced), as decoding would have gone.

    One prefill call of the P prompt tokens, then one decode call for each of the positions P .. n - 2:
    the last token of a sequence is never fed. In a conversation of several answers, what stands between two
    of
    them is another prefill call, which begins with the last token of the first: the cache is kept.

    Args:
        indices: per sequence [>= n - 1, L, K].
        token_ids: per sequence its n tokens; n > P >= 1. Those behind the last answer are left out.
        prompt_lengths: per sequence P, or its answers as [first token, the one behind the last).
        identity: fingerprint, model, settings.
    """
    answers = [
        [(prompt, len(ids))] if isinstance(prompt, int | np.integer) else list(prompt)
        for prompt, ids in zip(prompt_lengths, token_ids, strict=True)
    ]
    lengths = np.array([spans[-1][1] - 1 for spans in answers], np.int64)
    prompts = np.array([spans[0][0] for spans in answers], np.int64)
    sound = (prompts >= 1) & (lengths >= prompts)
    assert sound.all(), "a prompt and a completion of at least one token"
    sizes: list[int] = []
    phases: list[int] = []
    for spans in answers:
        fed = 0
        for start, end in spans:
            start = fed if fed and start == fed + 1 else start  # one answer right behind another
            read, decoded = start - fed, end - 1 - start
            sizes += [read] * (read > 0) + [1] * decoded
            phases += [0] * (read > 0) + [1] * decoded
            fed = end - 1
    ages = [np.arange(size - 1, -1, -1) for size in sizes]
    return Trace(
        indices=_one_behind_the_other([rows[:n] for rows, n in zip(indices, lengths, strict=True)]),
        call_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        call_phase=np.array(phases),
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        ages=np.concatenate(ages),
        valid=np.ones(int(lengths.sum()), bool),
        token_ids=np.concatenate([ids[:n] for ids, n in zip(token_ids, lengths, strict=True)]),
        prompt_lengths=prompts,
        num_experts=num_experts,
        **identity,
    )
