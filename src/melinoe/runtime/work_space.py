"""What one forward pass computes with, in bytes, counted on a model without weights.

The skeleton of the model runs once on the meta device, which knows shapes and computes nothing, and the
tensors that live at the same time are added up. So nothing is assumed of a family's attention, state spaces
or shared experts. Attention itself is not run where transformers leaves it to torch, whose kernels keep no
scores. All rows go through one expert: no routing needs more.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental._config import patch  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.experts.forward import combine, expert_output
from melinoe.experts.row_counts import row_counts
from melinoe.models.layers import experts_modules, per_expert
from melinoe.models.shapes_alone import shapes_alone
from melinoe.models.undecorated import take_over
from melinoe.runtime.known_shapes import KnownShapes

_STAND_IN = "melinoe_work_space"
# float32 copies of a row's logits that choosing a token takes at most: processors, sorting, probabilities
LOGITS_COPIES = 10
KERNELS = 1.15  # times what operations take: their own scratch, and holes that the allocator keeps
_FEW = (8, 24)  # tokens
_MOST_OPERATIONS = 6_000  # of 20 to 40 microseconds
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True)
class WorkSpace:
    """Of one forward pass, and what it leaves in transformers' own cache.

    num_bytes: that live at once, the cache apart. shapes: different matrix products of a request.
    cache_bytes, cache_bytes_per_token: of one sequence, whatever its length and for each token, as if no
    layer had a window.
    """

    num_bytes: int
    shapes: int
    cache_bytes: int
    cache_bytes_per_token: int


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live. `peak` is the most there was.

    products: the shapes of matrix products that were computed. operations: how many there were. cache_bytes:
    of the cache that a run has left. attention: what was seen of it.

    Args:
        known: shapes that need not be worked out again; None: all are.
    """

    attention: _NoScores

    def __init__(self, known: KnownShapes | None = None) -> None:
        super().__init__()
        self._shapes = known
        self.now = self.peak = self.operations = self.cache_bytes = 0
        self.products: set[tuple[torch.Size, ...]] = set()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are there already and do not count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self._shapes.of(func, args, kwargs) if self._shapes else func(*args, **kwargs)
        self.operations += 1
        if func.__name__.partition(".")[0] in _PRODUCTS:
            self.products.add(tuple(one.shape for one in args if isinstance(one, torch.Tensor)))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._known:
                size = storage.nbytes()
                self._known.add(storage)
                self.now += size
                weakref.finalize(storage, self._end, size)
        self.peak = max(self.peak, self.now)
        return found

    def _end(self, size: int) -> None:
        self.now -= size


class _NoValues(TorchDispatchMode):
    """Where a model asks a tensor without values for a number: 1, and for a condition: it does not hold.

    Models ask how long the longest text is, for positions that are scaled by it (dynamic, longrope): the same
    shapes whatever is answered.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Inside of it, a model on the meta device can run, though it looks at numbers."""
    every = patch(meta_nonzero_assume_all_nonzero=True)  # qwen4_exp looks for what a token may see: all
    with every, _NoValues():
        yield


class _NoScores(TorchFunctionMode):
    """Attention by torch's own kernels: an output as large as the queries, and no scores.

    layers: how often it was called. bytes_per_token: of keys and values as the largest of them gets them, all
    sequences together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.bytes_per_token = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = given["query"], given["key"], given["value"]
            self.layers += 1
            self.bytes_per_token = max(self.bytes_per_token, (key.nbytes + value.nbytes) // key.shape[-2])
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def work_space(skeleton: Any, rows: int, length: int, context: int) -> WorkSpace:
    """What one forward pass computes with, the weights apart.

    Args:
        skeleton: on the meta device, its experts included; its experts function is changed.
        rows: sequences.
        length: tokens of each that go through at once.
        context: tokens of each that are in the cache then, these included.
    """
    config, dtype = skeleton.config.get_text_config(), skeleton.dtype
    experts_products = use_stand_in(skeleton)
    known = KnownShapes()
    few, more = (_run(skeleton, known, 1, tokens, use_cache=True) for tokens in _FEW)
    between = _FEW[1] - _FEW[0]
    # state spaces without their kernels take a step of Python for every token: then some tokens stand for all
    operations = rows * (more.operations - few.operations) / between
    counted = length
    if operations * length > _MOST_OPERATIONS:
        counted = min(length, max(64, int(_MOST_OPERATIONS / operations)))
    live = _run(skeleton, known, rows, counted)
    peak = live.peak
    if counted < length:
        half = _run(skeleton, known, rows, counted // 2).peak
        peak += max(0, peak - half) * (length - counted) // (counted - counted // 2)
    per_token = (more.cache_bytes - few.cache_bytes) // between
    # the mask: boolean, and once more as torch's kernels take it
    beside = rows * length * context * (1 + dtype.itemsize)
    keys = live.attention.bytes_per_token
    if keys > rows * per_token / max(1, live.attention.layers):  # one for each head, made of the cache's
        beside += (context - length) * keys
    if dtype.itemsize == 2:  # torch's kernel lays keys and values out anew for products of this kind
        beside += context * keys
    if (
        skeleton.config._attn_implementation == "eager"
    ):  # it keeps scores; those of this pass alone were counted
        heads = config.num_attention_heads
        beside += rows * length * (context - length) * heads * (4 + 2 * dtype.itemsize)
    return WorkSpace(
        int(KERNELS * (peak + beside)) + rows * config.vocab_size * 4 * LOGITS_COPIES,
        # all but the experts' are computed for a prompt and for a token, and the output layer was not run
        2 * (len(live.products) + 1) + experts_products * row_counts(rows * length),
        few.cache_bytes - _FEW[0] * per_token,
        per_token,
    )


def _bytes(part: Any) -> int:
    return sum(one.nbytes for one in tree_leaves(part) if isinstance(one, torch.Tensor))


def _run(skeleton: Any, known: KnownShapes, rows: int, length: int, use_cache: bool = False) -> LiveBytes:
    """One forward pass on shapes."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    # a mask of four dimensions is taken as it is; others are looked into, and there is nothing to see
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    with torch.no_grad(), without_values(), LiveBytes(known) as live, _NoScores() as attention:
        live.ignore((*skeleton.parameters(), *skeleton.buffers()))
        found = skeleton.base_model(input_ids=ids, attention_mask=mask, use_cache=use_cache)
    live.attention = attention
    if use_cache:
        live.cache_bytes = sum(_bytes(vars(layer)) for layer in found.past_key_values.layers)
    return live


def use_stand_in(model: Any) -> int:
    """Makes the experts of a model on the meta device compute every row by one expert, or seem to.

    Returns:
        How many different matrices they multiply by.
    """
    tensors = {}
    for _, module in experts_modules(model):
        own = module.named_parameters(recurse=False)
        tensors[module] = {name: per_expert(one, int(module.num_experts))[0] for name, one in own}  # type: ignore[arg-type]

    def experts(
        module: nn.Module, hidden_TH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As melinoe_experts, with a row of every token for one expert."""
        rows = torch.arange(len(hidden_TH), device="meta")
        part = expert_output(module, hidden_TH[rows], tensors[module], 0)
        outputs = part.new_zeros(top_k_index.numel(), part.shape[-1])
        outputs[rows] = part
        return combine(outputs, top_k_weights, top_k_index.shape[1], hidden_TH.dtype)

    ALL_EXPERTS_FUNCTIONS.register(_STAND_IN, experts)
    if not take_over(model, experts):
        model.set_experts_implementation(_STAND_IN)
    return len({part.shape for parts in tensors.values() for part in parts.values() if part.dim() > 1})


def twin(model: Any) -> Any:
    """The same model on the meta device, its experts included."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with shapes_alone():
        return type(model)._from_config(config, dtype=model.dtype)
