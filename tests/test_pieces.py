"""The likelihood in pieces: what the whole gives, without ever the logits of all tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, config, save_checkpoint
from melinoe.data.spans import Encoded
from melinoe.losses import likelihood as module
from melinoe.losses.likelihood import likelihood, likelihood_in_pieces
from melinoe.models.layers import moe_layers
from melinoe.models.logits import hidden_at, logits_at
from melinoe.models.pretrained import skeleton
from melinoe.runtime.work_space import LiveBytes
from melinoe.tuning.evaluation import Evaluation
from melinoe.tuning.memory.activations import BatchShape, count
from melinoe.tuning.model import prepare_model
from melinoe.tuning.parallel.processes import Processes
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.losses import StepLosses
from melinoe.tuning.step.pieces import logits_are_plain

SETTINGS = TuneSettings(rank=4, distill=0.5, distill_prompt=True)
ROWS, LENGTH = 3, 40


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("at_once", [1, 4, 11, 100])
@pytest.mark.parametrize("tokens", [0, 11])
def test_pieces_add_up_to_the_whole(tokens: int, at_once: int, compared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(8, 32, bias=True).requires_grad_(False)
    hidden, base = (torch.randn(tokens, 8, generator=generator) for _ in range(2))
    next_tokens = torch.randint(32, (tokens,), generator=generator)
    kept = torch.rand(tokens, generator=generator) < 0.5
    found = []
    for whole in (True, False):
        given = hidden.clone().requires_grad_()
        others = base if compared else None
        if whole:
            one = likelihood(layer(given), next_tokens, kept, None if others is None else layer(others))
        else:
            one = likelihood_in_pieces(layer, given, next_tokens, kept, others, at_once)
        ((one.nll * 0.7) + (0 if one.divergence is None else one.divergence * 0.3)).backward()
        found.append({**vars(one), "gradient": given.grad})
    for name, value in found[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[1][name], value, msg=name)
        else:
            assert found[1][name] == value, name


def part(rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Two rows with padding on the right, one without; the second half is the answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    lengths = torch.tensor([length, *[length - 5] * (rows - 1)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    answers = mask.bool() & (torch.arange(length) >= length // 2)
    return {"input_ids": ids, "attention_mask": mask, "answers": answers}


def prepared(base, settings=SETTINGS):
    """A model whose tuned routers and factors are not the base's."""
    model, layers = prepare_model(base, settings, "cpu")
    losses = StepLosses(model, layers, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers:
            for weight in (*layer.router.parameters(), *layer.experts.low_rank.parameters()):
                weight.add_(0.1 * torch.randn_like(weight))
    return model, losses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("on_prompt", [False, True], ids=["answers", "prompt too"])
@pytest.mark.parametrize(("family", "plain"), [("olmoe", True), ("gpt_oss", True), ("granitemoe", False)])
def test_a_step_is_the_same(tmp_path, monkeypatch, family, plain, on_prompt, checkpointing):
    """granitemoe divides its logits after the output layer: there they are computed as the model does it."""
    base = save_checkpoint(tmp_path / "m", family)
    settings = dataclasses.replace(SETTINGS, distill_prompt=on_prompt)
    found = []
    for piece_bytes in (2**40, 4 * 64 * 7):
        monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
        model, losses = prepared(base, settings)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        one, tap = losses.quality(model, part())
        (one.nll + 2 * one.divergence).backward()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        found.append((one, [weight.grad for weight in trained], len(tap.records), losses.pieces.plain))
    (whole, whole_gradients, whole_layers, asked), (pieces, gradients, layers, answer) = found
    assert (asked, answer) == (None, plain)
    assert layers == whole_layers
    assert (pieces.tokens, pieces.divergence_tokens) == (whole.tokens, whole.divergence_tokens)
    for name in ("nll", "divergence", "base_nll"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, whole_gradients, rtol=1e-4, atol=1e-5)


class Largest(LiveBytes):
    """The largest tensor besides, of those that are made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, peak = self.now, self.peak
        self.peak = 0
        found = super().__torch_dispatch__(func, types, args, kwargs)
        self.largest = max(self.largest, self.peak - before)
        self.peak = max(self.peak, peak)
        return found


def test_the_logits_of_all_tokens_are_never_there(tmp_path, monkeypatch):
    """Nor do a step's take more than is counted; what is counted is far less than all logits once."""
    theirs, vocabulary, at_once = config("olmoe"), 4096, 8
    theirs.vocab_size = vocabulary
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * vocabulary * at_once)
    model, losses = prepared(tmp_path / "m")
    inputs = part()
    predicted = int(inputs["attention_mask"].sum()) - ROWS
    assert losses.pieces.at_once(model, predicted) == at_once  # asks a model without weights, once
    with Largest() as live:
        live.ignore((*model.parameters(), *model.buffers()))
        one, _ = losses.quality(model, inputs)
        (one.nll + one.divergence).backward()
    all_logits = 4 * vocabulary * predicted
    assert live.largest <= 4 * vocabulary * at_once
    empty = skeleton(tmp_path / "m")
    counted = count(empty, moe_layers(empty), BatchShape(ROWS, LENGTH, predicted), SETTINGS)
    gradients = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert live.peak <= counted.kept + counted.transient + gradients < all_logits + gradients


@pytest.mark.parametrize(("family", "pieces"), [("olmoe", True), ("granitemoe", False)])
def test_the_plan_counts_pieces_where_there_are_any(tmp_path, monkeypatch, family, pieces):
    base = save_checkpoint(tmp_path / "m", family)

    def kept() -> int:
        empty = skeleton(base)
        return count(empty, moe_layers(empty), BatchShape(ROWS, LENGTH, 100), SETTINGS).kept

    whole = kept()
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * 64)
    assert (kept() < whole) == pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_logits_are_what_the_output_layer_makes_of_its_input(tmp_path, family):
    """On real weights: where logits are said to be plain, they are; and more are than are not."""
    model = AutoModelForCausalLM.from_config(config(family)).eval()
    inputs = {name: part()[name] for name in ("input_ids", "attention_mask")}
    chosen = inputs["attention_mask"].bool()
    assert logits_are_plain(model) == (family not in ("granitemoe",))
    if logits_are_plain(model):
        with torch.no_grad():
            pieces = model.get_output_embeddings()(hidden_at(model, inputs, chosen))
            torch.testing.assert_close(pieces.float(), logits_at(model, inputs, chosen))


def test_evaluating_in_pieces_is_the_same(tmp_path, monkeypatch):
    model, losses = prepared(save_checkpoint(tmp_path / "m", "olmoe"))
    rows = [Encoded(list(range(3, 3 + length)), ((length // 2, length),)) for length in (9, 14, 20)]
    found = []
    for piece_bytes in (2**40, 4 * 64 * 3):
        monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
        evaluation = Evaluation(rows, losses.layers, 3, 64, 0, Processes())
        found.append(evaluation.measure(model))
        assert evaluation.pieces.plain is (None if piece_bytes == 2**40 else True)
    assert found[1]["nll"] == pytest.approx(found[0]["nll"], rel=1e-5)
    assert found[1]["hit_rate"] == found[0]["hit_rate"]
