"""transformers' list of logits processors, whose signatures are looked at once and not for every token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList


class Processors(LogitsProcessorList):
    """Processors of ids and scores and of nothing else, called in their order, as the list itself does."""

    @classmethod
    def of(cls, processors: LogitsProcessorList) -> LogitsProcessorList:
        """The same processors; the list as it is, where one wants more, or the list is another one."""
        takes_two = all(len(inspect.signature(one.__call__).parameters) <= 2 for one in processors)
        return cls(processors) if takes_two and type(processors) is LogitsProcessorList else processors

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


def sample(in_place: Any, input_ids: torch.Tensor, streamer: Any, arguments: dict[str, Any]) -> Any:
    """transformers' loop that chooses token by token, with an object in the model's place."""
    loop: Any = GenerationMixin._sample
    arguments["logits_processor"] = Processors.of(arguments["logits_processor"])
    return loop(in_place, input_ids, streamer=streamer, **arguments)
