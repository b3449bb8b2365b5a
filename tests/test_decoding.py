"""The recorded decode step gives the tokens and the logits of `model.generate`, or steps aside."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
)

import melinoe
from families import FAMILIES, batch, resident, save_checkpoint
from family_configs import config
from melinoe.decoding import groups, loop
from melinoe.decoding.decoder import decoder_of
from melinoe.decoding.linears import Linears, gathered
from melinoe.decoding.processors import Processors
from melinoe.decoding.recorded import Call, Event, Slot
from melinoe.experts import compiled, few_rows_linear, forward
from melinoe.experts.low_rank import attach_low_rank
from melinoe.models.layers import experts_modules
from melinoe.store import packed_rows

NEW_TOKENS = 14
# why the steps of a family are not replayed; the others are
EAGER = {
    "phimoe": "prepare_inputs_for_generation of its own",
    "nemotron_h": "prepare_inputs_for_generation of its own",
    "qwen3_next": "uses get_conv_state of its cache",
    "lfm2_moe": "uses get_conv_state of its cache",
    "jamba": "uses get_conv_state of its cache",
    "llama4_text": "uses get_seq_length of its cache",
    "dbrx": "reads values of a tensor",
}


class Logits(LogitsProcessor):
    """Keeps what the model computed for every step."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.clone())
        return scores


def both(model, ids, new_tokens=NEW_TOKENS, **settings):
    """(tokens by model.generate, tokens by ours); every bit of the logits is compared."""
    found = []
    for run in (model.generate, lambda *args, **kwargs: loop.generate(model, *args, **kwargs)):
        torch.manual_seed(0)
        logits = Logits()
        tokens = run(
            ids,
            max_new_tokens=new_tokens,
            logits_processor=LogitsProcessorList([logits]),
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            **settings,
        )
        found.append((tokens, logits.steps))
    (expected, theirs), (tokens, ours) = found
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    return expected, tokens


def prompt(length=9, seed=0):
    return batch(length, seed)["input_ids"][:1]


def made(family, **changes):
    """A small random model with changed settings."""
    settings = config(family)
    for name, value in changes.items():
        setattr(settings, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.numel() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model(olmoe):
    return resident(olmoe)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_generate_does(family, tmp_path):
    model = resident(save_checkpoint(tmp_path / "model", family))
    why = loop.why_stock(model, prompt(), {})
    for seed in range(2):  # the second answer is replayed from its first step
        expected, tokens = both(model, prompt(seed=seed), min_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(tokens, expected)
    decoder = decoder_of(model)
    if family in EAGER:
        assert EAGER[family] in (why or decoder.why_eager)
        assert not decoder.replays
    else:
        assert (why, decoder.why_eager, decoder.replays) == ("", "", 1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 12}),
        ("gpt_oss", {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}),
        ("afmoe", {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma4_text", {"sliding_window": 12}),
        ("olmoe", {"_attn_implementation": "eager"}),
    ],
    ids=["all windows", "sinks", "some windows", "shared keys", "eager attention"],
)
def test_lengths_on_both_sides_of_a_window(family, changes):
    model = made(family, **changes)
    for length in (5, 20, 3, 11):
        expected, tokens = both(model, prompt(length), 20, min_new_tokens=20, do_sample=False)
        assert torch.equal(tokens, expected), length
    assert decoder_of(model).why_eager == "" and decoder_of(model).replays in (1, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "eos_token_id": list(range(20, 40))},
        {"do_sample": False, "prefill_chunk_size": 4},
    ],
    ids=["sampling", "warpers", "penalties", "ends early", "prefill in chunks"],
)
def test_the_rules_are_those_of_transformers(model, settings):
    for seed in range(3):
        expected, tokens = both(model, prompt(seed=seed), **settings)
        assert torch.equal(tokens, expected)
    assert decoder_of(model).replays


@pytest.mark.parametrize("compiled_rows", [False, True], ids=["torch", "compiled"])
def test_paged_with_the_same_decisions(tmp_path, monkeypatch, compiled_rows):
    if not compiled_rows:
        monkeypatch.setattr(compiled, "_library", None)
        monkeypatch.setattr(compiled, "_asked", True)
    source = save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16)
    melinoe.convert(source, tmp_path / "store", progress=False)
    own = resident(source)
    for slots in (0, 3, 6, 8):
        seen = []
        for run in (lambda one, ids, **more: one.generate(ids, **more), loop.generate):
            paged = melinoe.load(tmp_path / "store", slots=slots)
            decisions = []
            paged.melinoe_paged.pager.watcher = lambda *decision, seen=decisions: seen.append(decision)
            for seed in range(3):
                ids = prompt(seed=seed)
                tokens = run(paged, ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
                expected = own.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
                assert torch.equal(tokens, expected)
            counted = melinoe.stats(paged).to_json()
            counted = {name: value for name, value in counted.items() if not name.endswith("stalled_seconds")}
            seen.append((counted, decisions))
        assert decoder_of(paged).replays == 1
        traced = slots and not compiled.few(torch.zeros(1, 1, dtype=torch.bfloat16))
        assert decoder_of(paged).functions == bool(traced)  # all experts in slots, at least once
        assert seen[0] == seen[1] and seen[0][0]["decode_requests"] > 0


@pytest.mark.parametrize(
    ("family", "record_format", "functions"),
    [
        ("olmoe", "int8", 1),
        ("olmoe", "int4", 1),
        ("gpt_oss", "auto", 1),
        ("gpt_oss", "int8", 0),
        ("gemma4_text", "auto", 1),
        ("ernie4_5_moe", "auto", 1),
    ],
)
def test_experts_of_all_kinds_for_one_token(family, record_format, functions, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_library", None)  # what it computes is not traced
    monkeypatch.setattr(compiled, "_asked", True)
    monkeypatch.setattr(packed_rows, "_library", lambda: None)
    source = save_checkpoint(tmp_path / "model", family, torch.bfloat16)
    melinoe.convert(source, tmp_path / "store", progress=False, format=record_format)
    paged = melinoe.load(tmp_path / "store", slots=8)
    for seed in range(3):
        expected, tokens = both(paged, prompt(seed=seed), do_sample=False)
        assert torch.equal(tokens, expected)
    found = decoder_of(paged)
    assert (found.why_eager, found.replays) == ("", 1)
    if record_format == "auto" or paged.melinoe_paged.pager.packed:  # a processor without the kernels expands
        assert found.functions == functions


def by_pointer(tensor):
    """A copy that torch does not see: traced, it would be whatever the new memory holds."""
    out = torch.empty_like(tensor)
    ctypes.memmove(out.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return out


def test_experts_that_are_computed_beyond_torch_are_not_traced(olmoe_store, monkeypatch):
    output = forward.expert_output
    monkeypatch.setattr(forward, "expert_output", lambda *given: by_pointer(output(*given)))
    paged = melinoe.load(olmoe_store, slots=8)
    for seed in range(3):
        expected, tokens = both(paged, prompt(seed=seed), do_sample=False)
        assert torch.equal(tokens, expected)
    assert decoder_of(paged).replays == 1 and decoder_of(paged).functions == 0


def test_a_layer_that_is_computed_beyond_torch_is_left_alone(olmoe):
    model = resident(olmoe)
    layer = model.model.layers[1]
    layer.forward = lambda *args, forward=layer.forward, **kwargs: by_pointer(forward(*args, **kwargs))
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)
    assert decoder_of(model).why_eager == "reads values of a tensor (data_ptr)"


def test_low_rank_additions_of_an_adapter(olmoe, olmoe_store):
    paged = melinoe.load(olmoe_store, slots=8)
    both(paged, prompt(), do_sample=False)
    assert decoder_of(paged).functions == 1
    for _, module in experts_modules(paged):
        attach_low_rank(module, 2, 4.0)
        for parameter in module.low_rank.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    paged.requires_grad_(False)
    expected, tokens = both(paged, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)
    assert decoder_of(paged).replays == 1 and decoder_of(paged).functions == 0


def test_processors_are_those_of_the_list():
    class Doubles(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * 2 + input_ids[0, -1]

    class WantsMore(LogitsProcessor):
        def __call__(self, input_ids, scores, beams):
            return scores

    class Mine(LogitsProcessorList):
        pass

    ids, scores = torch.tensor([[1, 5]]), torch.randn(1, 7)
    plain = LogitsProcessorList([Doubles(), MinPLogitsWarper(0.1), Doubles()])
    ours = Processors.of(plain)
    assert type(ours) is Processors and list(ours) == list(plain)
    assert torch.equal(ours(ids, scores), plain(ids, scores))
    for other in (LogitsProcessorList([Doubles(), WantsMore()]), Mine([Doubles()])):
        assert Processors.of(other) is other


def test_who_stops_it_is_asked_after_every_token(model):
    class AfterThree(StoppingCriteria):
        asked = 0

        def __call__(self, input_ids, scores, **_):
            self.asked += 1
            return torch.full((1,), self.asked == 3)

    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.reshape(-1).tolist())

        def end(self):
            self.seen.append("end")

    streamers = Streamer(), Streamer()
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    for streamer, run in zip(
        streamers, (model.generate, lambda ids, **more: loop.generate(model, ids, **more)), strict=True
    ):
        run(prompt(), streamer=streamer, stopping_criteria=StoppingCriteriaList([AfterThree()]), **settings)
    assert streamers[0].seen == streamers[1].seen
    assert len(streamers[1].seen) == 1 + 3 + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=["beams", "prompt lookup", "no cache", "static cache"],
)
def test_what_it_cannot_do_is_done_by_generate(model, settings):
    settings |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert loop.why_stock(model, prompt(), settings)
    assert torch.equal(loop.generate(model, prompt(), **settings), model.generate(prompt(), **settings))


def test_weights_that_change_are_seen(olmoe):
    model = resident(olmoe)
    both(model, prompt(), do_sample=False)
    assert decoder_of(model).replays == 1
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(3)  # in place
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(torch.rand_like(norm.weight), requires_grad=False)  # another one
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)
    head = model.lm_head
    model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, bias=True))
    model.requires_grad_(False)
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)


def test_settings_that_change_are_seen(olmoe):
    model = resident(olmoe)
    both(model, prompt(), do_sample=False)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)
    model.config.clip_qkv = 0.01
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected)
    model.set_attn_implementation("eager")
    expected, tokens = both(model, prompt(), do_sample=False)
    assert torch.equal(tokens, expected) and decoder_of(model).replays == 1


def test_a_hook_is_called_for_every_token(olmoe):
    model = resident(olmoe)
    both(model, prompt(), do_sample=False)
    called = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1))
    loop.generate(model, prompt(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(called) == 6
    hook.remove()
    loop.generate(model, prompt(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(called) == 6 and decoder_of(model).why_eager == ""


def scaled(by):
    """A layer's output times what `by` finds in the layer's arguments."""

    def around(forward):
        def changed(*args, **kwargs):
            return forward(*args, **kwargs) * by(kwargs)

        return changed

    return around


class Counting:
    """Changes with each call, as nothing that torch sees does."""

    calls = 0

    def __call__(self, _):
        self.calls += 1
        return 1 + self.calls / 1000


@pytest.mark.parametrize(
    ("by", "why"),
    [
        (lambda kwargs: kwargs["past_key_values"].get_seq_length() / 10, "uses get_seq_length of its cache"),
        (lambda kwargs: kwargs["past_key_values"].layers[0].keys.shape[2] / 10, "uses layers of its cache"),
        (lambda kwargs: 1 + kwargs["position_ids"][0, -1].item() / 10, "reads values of a tensor (item)"),
        (lambda kwargs: 2 if kwargs["position_ids"].sum() > 15 else 1, "reads values of a tensor (__bool__)"),
        (lambda _: torch.from_numpy(torch.ones(1).numpy()), "reads values of a tensor (numpy)"),
    ],
    ids=["length", "keys", "number", "condition", "around torch"],
)
def test_a_model_that_looks_at_the_length_is_left_alone(olmoe, by, why):
    model = resident(olmoe)
    layer = model.model.layers[1]
    layer.forward = scaled(by)(layer.forward)
    expected, tokens = both(model, prompt(), min_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens, expected)
    assert (decoder_of(model).why_eager, decoder_of(model).replays) == (why, 0)


def test_a_model_that_does_another_thing_each_time_is_left_alone(olmoe):
    found = []
    for run in (lambda one, *args, **more: one.generate(*args, **more), loop.generate):
        model = resident(olmoe)
        layer = model.model.layers[1]
        layer.forward = scaled(Counting())(layer.forward)
        found.append(run(model, prompt(), max_new_tokens=9, min_new_tokens=9, do_sample=False))
    assert torch.equal(*found)
    assert "two lengths" in decoder_of(model).why_eager


def test_a_torch_without_torchscript(olmoe_store, monkeypatch):
    def gone(*_, **__):
        raise RuntimeError("TorchScript is no longer part of torch")

    monkeypatch.setattr(torch.jit, "trace", gone)
    paged = melinoe.load(olmoe_store, slots=8)
    expected, tokens = both(paged, prompt(), min_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens, expected)
    assert decoder_of(paged).why_eager == "cannot be written in TorchScript (RuntimeError)"


def test_another_thread_may_run_the_model_while_a_step_is_recorded(olmoe):
    model = resident(olmoe)
    other = prompt(seed=5)
    with torch.no_grad():
        expected_logits = model(other).logits
    layer, asked = model.model.layers[0], []
    forward = layer.forward

    def beside():
        with torch.no_grad():
            asked.append(torch.equal(model(other).logits, expected_logits))

    def changed(*args, **kwargs):
        if args[0].shape[1] == 1 and len(asked) < 2:  # the steps that are recorded
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
        return forward(*args, **kwargs)

    expected = model.generate(prompt(), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    layer.forward = changed
    tokens = loop.generate(model, prompt(), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert torch.equal(tokens, expected)
    assert asked == [True, True] and (decoder_of(model).why_eager, decoder_of(model).replays) == ("", 1)


def test_what_cannot_be_replayed_to_the_bit_is_left_alone(olmoe, monkeypatch):
    from melinoe.decoding import replay

    model = resident(olmoe)
    trace = torch.jit.trace

    def another(function, *args, **kwargs):
        return trace(lambda *inputs: [one * 1.0000001 for one in function(*inputs)], *args, **kwargs)

    monkeypatch.setattr(replay.torch.jit, "trace", another)
    expected, tokens = both(model, prompt(), min_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens, expected)
    assert "by TorchScript" in decoder_of(model).why_eager


def linear_calls(items):
    """How many layers each call of linear layers has, and what lies between, by name."""
    return [len(one.parts) if isinstance(one, Linears) else one.function.__name__ for one in gathered(items)]


def test_projections_of_one_input_are_computed_together(tmp_path, monkeypatch):
    if not compiled.prepare():
        pytest.skip("no compiler")
    monkeypatch.setattr(few_rows_linear, "LARGE", 1)
    monkeypatch.setattr(groups, "native", lambda: None)  # else they are part of a program
    model = resident(save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16))
    for seed in range(2):
        expected, tokens = both(model, prompt(seed=seed), do_sample=False)
        assert torch.equal(tokens, expected)
    together = [len(one.parts) for one in decoder_of(model).steps if isinstance(one, Linears)]
    assert together == [3, 1, 3, 1, 1]  # query, key and value, and the output, of two layers; the head


def test_projections_are_not_brought_across_what_writes():
    layer = few_rows_linear.FewRowsLinear(4, 4, bias=False)

    def linear(source, result):
        return Event(layer.forward, (Slot(source),), {}, [Slot(result)], kind="experts")

    def call(function, *given, results=()):
        return Call(function, tuple(map(Slot, given)), {}, list(map(Slot, results)))

    around = [linear(0, 1), linear(0, 2)]
    between = {
        "nothing": ([], [2]),
        "silu": ([call(torch.nn.functional.silu, 1, results=[3])], [2, "silu"]),
        "in place": ([call(torch.Tensor.mul_, 0, results=[0])], [1, "mul_", 1]),
        "an item": ([call(torch.Tensor.__setitem__, 0, 1)], [1, "__setitem__", 1]),
        "the same tensor": ([call(torch.relu, 0, results=[0])], [1, "relu", 1]),
        "an event": ([Event(len, (Slot(1),), {}, kind="experts")], [1, "len", 1]),
    }
    for name, (items, expected) in between.items():
        assert linear_calls([around[0], *items, around[1]]) == expected, name
    assert linear_calls([linear(0, 1), linear(5, 2), linear(0, 3)]) == [2, 1]
