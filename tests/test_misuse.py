"""What a hostile user would do to get a wrong token: it must be refused, or the tokens must be right."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import melinoe
from families import batch, resident, save_checkpoint
from melinoe.experts import forward
from melinoe.paging.disk_reader import DiskReader
from melinoe.paging.weights_file import WeightsFile
from melinoe.runtime.load import reset_slots
from melinoe.store.manifest import RESIDENT

SEEDS = range(4)


def greedy(model, seed=0, **settings):
    return model.generate(
        **batch(seed=seed), max_new_tokens=12, min_new_tokens=12, do_sample=False, **settings
    )


@pytest.fixture(scope="module")
def expected(olmoe):
    model = resident(olmoe)
    return [greedy(model, seed) for seed in SEEDS]


@pytest.fixture
def slow_reads(monkeypatch):
    """Every record is first wrong, then right: what is used before it has landed gives other tokens.

    The next read after `late.set()` takes so long that other records would be in its place when it ends.
    """
    real, late = WeightsFile.read, threading.Event()

    def read(self, destination, offset):
        if late.is_set():
            late.clear()
            time.sleep(0.15)
        destination[:] = b"\x11" * len(destination)
        time.sleep(0.001)
        real(self, destination, offset)

    monkeypatch.setattr(WeightsFile, "read", read)
    return late


def exact(model, expected):
    return all(torch.equal(greedy(model, seed), expected[seed]) for seed in SEEDS)


def test_slow_reads_are_waited_for(olmoe_store, expected, slow_reads):
    for slots in (0, 1, 3, 8):
        assert exact(melinoe.load(olmoe_store, slots=slots), expected), slots


def test_a_call_inside_a_call_is_refused(olmoe_store, expected, monkeypatch):
    """It would read into the staging records that the outer one computes with."""
    model = melinoe.load(olmoe_store, slots=1)
    real, depth = forward.expert_output, []

    def nested(module, hidden, weights, expert):
        if not depth:
            depth.append(1)
            forward.melinoe_experts(module, hidden[:1], torch.tensor([[0, 7]]), torch.ones(1, 2))
        return real(module, hidden, weights, expert)

    with monkeypatch.context() as patch:
        patch.setattr(forward, "expert_output", nested)
        with pytest.raises(AssertionError, match="a call inside a call"):
            greedy(model)
    assert exact(model, expected)


def interrupt(monkeypatch, where, at, late=None):
    """Raises KeyboardInterrupt after the `at`-th call of one function; `calls` counts."""
    owner, name = where
    real, calls = getattr(owner, name), [0]

    def then_stop(*args, **settings):
        calls[0] += 1
        if calls[0] == at and late is not None:
            late.set()
        result = real(*args, **settings)
        if calls[0] == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, then_stop)
    return calls


@pytest.mark.parametrize("at", [1, 3, 8, 13])
@pytest.mark.parametrize(
    "where",
    [(forward, "expert_output"), (DiskReader, "read")],
    ids=["in an expert", "behind the start of a read"],
)
def test_interrupted_and_used_again(olmoe_store, expected, slow_reads, monkeypatch, where, at):
    """The second one is a read that nobody knows of: its future was lost."""
    model = melinoe.load(olmoe_store, slots=5, policy="lru")  # slots change hands often
    greedy(model, 1)
    with monkeypatch.context() as patch:
        calls = interrupt(patch, where, at, slow_reads)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, 2)
        assert calls[0] == at
    assert exact(model, expected)


def test_interrupted_twice(olmoe_store, expected, slow_reads, monkeypatch):
    """Ctrl-C again while the pager waits for the reads that the first one left behind."""
    model = melinoe.load(olmoe_store, slots=3)
    with monkeypatch.context() as patch:
        interrupt(patch, (forward, "expert_output"), 9)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, 2)
    with monkeypatch.context() as patch:
        calls = interrupt(patch, (DiskReader, "drain"), 1)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, 1)
        assert calls[0] == 1
    assert exact(model, expected)


@pytest.mark.parametrize("slots", [0, 3])
def test_two_threads_share_a_model(olmoe_store, expected, slow_reads, slots):
    model, found = melinoe.load(olmoe_store, slots=slots), {}

    def work(seed):
        found[seed] = greedy(model, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in SEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(SEEDS)
    assert all(torch.equal(found[seed], expected[seed]) for seed in SEEDS)


def test_two_models_take_turns(olmoe_store, expected, tmp_path):
    """Of the same shape, layer by layer and token by token in one process; and one store opened twice."""
    other = save_checkpoint(tmp_path / "other", "olmoe", seed=1)
    melinoe.convert(other, tmp_path / "store", progress=False)
    others = [greedy(resident(other), seed) for seed in SEEDS]
    mine, again = (melinoe.load(olmoe_store, slots=slots) for slots in (3, 2))
    theirs = melinoe.load(tmp_path / "store", slots=3)
    for seed in SEEDS:
        assert torch.equal(greedy(mine, seed), expected[seed])
        assert torch.equal(greedy(theirs, seed), others[seed])
        assert torch.equal(greedy(again, seed), expected[seed])
    ids = batch()["input_ids"]
    logits = {id(model): [] for model in (mine, theirs)}
    for length in range(1, 9):
        for model in (mine, theirs):
            logits[id(model)].append(model(ids[:, :length]).logits)
    for model, source in ((mine, None), (theirs, other)):
        reference = resident(source) if source is not None else melinoe.load(olmoe_store, slots=8)
        for length, one in enumerate(logits[id(model)], start=1):
            assert torch.equal(one, reference(ids[:, :length]).logits)


def test_a_fork_is_refused(olmoe_store, expected):
    """Slots are shared with a forked process (a server that loads before it forks)."""
    model = melinoe.load(olmoe_store, slots=3)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            greedy(model)
            text = "went through"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writable, text.encode())
        os._exit(0)
    os.close(writable)
    assert os.waitpid(child, 0)[1] == 0
    assert (
        os.read(readable, 4096)
        .decode()
        .startswith("MelinoeError: an offloaded model cannot be used in a fork")
    )
    os.close(readable)
    assert exact(model, expected)


@pytest.fixture
def copied(olmoe_store, tmp_path):
    return shutil.copytree(olmoe_store, tmp_path / "copied")


def overwrite(folder, other, pattern):
    """Writes another store's bytes into the same files, size unchanged."""
    for file in folder.glob(pattern):
        data = (other / file.name).read_bytes()
        assert len(data) == file.stat().st_size
        with file.open("r+b") as handle:
            handle.write(data)


def test_a_store_overwritten_while_it_is_in_use(copied, expected, tmp_path):
    other = save_checkpoint(tmp_path / "other", "olmoe", seed=1)
    melinoe.convert(other, tmp_path / "store", progress=False)
    model, all_in_slots = melinoe.load(copied, slots=2), melinoe.load(copied, slots=8)
    assert exact(model, expected)
    assert exact(all_in_slots, expected)
    overwrite(copied, tmp_path / "store", "resident.safetensors")
    assert exact(model, expected)  # the resident weights are the process's own
    overwrite(copied, tmp_path / "store", "experts-*.safetensors")
    assert exact(all_in_slots, expected)
    with pytest.raises(
        melinoe.MelinoeError, match=r"cannot read expert \d+ from .*has changed while it was in use"
    ):
        exact(model, expected)
    reset_slots(all_in_slots)
    with pytest.raises(melinoe.MelinoeError, match="has changed while it was in use"):
        greedy(all_in_slots)


def test_plain_from_pretrained_refuses_other_weights(copied, tmp_path):
    other = save_checkpoint(tmp_path / "other", "olmoe", seed=1)
    melinoe.convert(other, tmp_path / "store", progress=False)
    shutil.copy(tmp_path / "store" / RESIDENT, copied / RESIDENT)
    with pytest.raises(melinoe.MelinoeError, match="not those the store was made with"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_checkpoint_whose_config_was_edited(tmp_path):
    """The store made on first use has a copy of the old one."""
    source = save_checkpoint(tmp_path / "model", "olmoe")
    assert torch.equal(greedy(melinoe.load(source, slots=3)), greedy(resident(source)))
    text = (source / "config.json").read_text()
    assert '"num_experts_per_tok": 2' in text
    (source / "config.json").write_text(text.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 3'))
    assert torch.equal(greedy(melinoe.load(source, slots=3)), greedy(resident(source)))


@pytest.mark.parametrize("convert", [True, False], ids=["converted", "in place"])
def test_missing_weights_are_not_made_up(tmp_path, convert):
    """transformers warns, and fills them with random numbers."""
    source = save_checkpoint(tmp_path / "model", "olmoe")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if convert:
        melinoe.convert(source, tmp_path / "store", progress=False)
    with pytest.raises(
        melinoe.MelinoeError, match=r"lacks weights of the model; got nothing for lm_head\.weight"
    ):
        melinoe.load(tmp_path / "store" if convert else source, slots=3)


def test_moves_are_refused(olmoe_store, expected):
    model = melinoe.load(olmoe_store, slots=3)
    moves = {
        "to": lambda: model.to(torch.float16),
        "to(meta)": lambda: model.to("meta"),
        "half": lambda: model.half(),
        "double": lambda: model.double(),
        "inside another": lambda: nn.Sequential(model).to(torch.bfloat16),
    }
    for name, move in moves.items():
        with pytest.raises(melinoe.MelinoeError, match="stays in its dtype"):
            move()
        assert {p.dtype for p in model.parameters()} == {torch.float32}, name
    model.to("cpu").to(torch.float32).float()
    assert exact(model, expected)


def test_copies_are_refused(olmoe_store):
    model = melinoe.load(olmoe_store, slots=3)
    for take in (copy.deepcopy, pickle.dumps):
        with pytest.raises(melinoe.MelinoeError, match="cannot be copied or pickled"):
            take(model)


def test_compiled(olmoe_store, olmoe):
    """torch.compile: our function stays outside of the graphs, decisions are made at every call."""
    model, reference = melinoe.load(olmoe_store, slots=2), resident(olmoe)
    compiled = torch.compile(model.model.layers[1].mlp, backend="eager")
    for seed in SEEDS:
        hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(hidden), reference.model.layers[1].mlp(hidden))
    assert melinoe.stats(model).prefill_requests > 0


def test_autocast(olmoe_store, olmoe):
    """Casts of weights are cached for a while under autocast; a slot's weights change behind such a cache."""
    model, reference = melinoe.load(olmoe_store, slots=1), resident(olmoe)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in SEEDS:
            assert torch.equal(model(**batch(seed=seed)).logits, reference(**batch(seed=seed)).logits)


@pytest.mark.parametrize("slots", [0, 1, 8])
def test_sampling_inference_mode_and_rows_of_padding(olmoe_store, olmoe, slots):
    model, reference = melinoe.load(olmoe_store, slots=slots), resident(olmoe)
    inputs = batch()
    sampled = []
    for one in (model, reference):
        torch.manual_seed(5)
        sampled.append(
            one.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=3, top_k=20)
        )
    assert sampled[0].shape[0] == 6
    assert torch.equal(*sampled)
    with torch.inference_mode():
        assert torch.equal(greedy(model), greedy(reference))
    empty = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in inputs.items()}
    assert torch.equal(model(**empty).logits, reference(**empty).logits)
    nothing = {name: torch.zeros_like(value) for name, value in inputs.items()}
    assert torch.equal(model(**nothing).logits, reference(**nothing).logits)
    assert torch.equal(greedy(model), greedy(reference))
