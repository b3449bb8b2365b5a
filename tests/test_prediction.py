"""The predictor: learns what can be learnt, is deterministic, and refuses other models."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import melinoe
from melinoe.cli.main import app
from melinoe.errors import MelinoeError
from melinoe.measure.trace import trace
from melinoe.models.layers import fingerprint
from melinoe.prediction.comparison import warnings_of
from melinoe.prediction.features import num_features, prompt_features, token_table
from melinoe.prediction.fit import Predictor, fit_predictor, recall, worth_in_tokens
from melinoe.prediction.predictor import mean_prediction
from melinoe.routing.policies import DecayedCounts, prefill_call
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace, from_sequences
from text_model import model_and_tokenizer, rows, save


def topics(num_sequences=300, seed=0) -> Trace:
    """Sequences of two kinds: the prompt's tokens say which experts decoding wants, its routing does not."""
    model, _ = model_and_tokenizer()
    generator = np.random.default_rng(seed)
    indices, tokens, prompts = [], [], []
    for _ in range(num_sequences):
        topic, prompt, length = int(generator.integers(2)), int(generator.integers(3, 9)), 16
        prefill = [[generator.choice(8, 2, replace=False) for _ in range(2)] for _ in range(prompt)]
        liked = np.where(np.arange(8) // 4 == topic, 0.24, 0.01)
        decode = [
            [generator.choice(8, 2, replace=False, p=liked / liked.sum()) for _ in range(2)]
            for _ in range(length)
        ]
        indices.append(np.array(prefill + decode))
        tokens.append(
            [*generator.integers(5 + 10 * topic, 15 + 10 * topic, prompt).tolist(), *[3] * (length + 1)]
        )
        prompts.append(prompt)
    return from_sequences(indices, tokens, prompts, 8, fingerprint=fingerprint(model))


def test_features():
    table = token_table(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    features = prompt_features(table, [1, 2, 3])
    assert features.shape == (num_features(4),)
    assert torch.allclose(features[:4], table[[1, 2, 3]].float().mean(0))
    assert torch.isfinite(prompt_features(table, [1])).all()
    assert token_table(torch.randn(20, 600)).shape == (20, 256)


def test_learns_what_the_prompt_says(tmp_path):
    report = fit_predictor(model_and_tokenizer(), topics(), tmp_path / "p", slots=4, epochs=40, hidden=32)
    assert report["loss"] < report["loss_global"] - 0.3
    assert report["recall_predictor"] > 0.85 > 0.7 > max(report["recall_global"], report["recall_prefill"])
    assert report["recall_oracle"] >= report["recall_predictor"]
    assert report["num_held_out"] == 30
    strength = Predictor.load(tmp_path / "p").strength
    assert report["prior_tokens"] == strength.tokens >= 40
    assert report["horizon"] == strength.horizon

    test = topics(40, seed=1)
    predictor = Predictor.load(tmp_path / "p", model_and_tokenizer()[0])
    scores = np.stack([predictor.scores(prompt) for prompt in test.prompts()])
    assert scores.shape == (40, 2, 8)
    assert scores.sum(-1) == pytest.approx(2, abs=1e-4)
    plain, predicted = (
        simulate(test, "decay", 4, predictor_scores=given)["results"][0]["loads_per_token"]
        for given in (None, scores)
    )
    assert predicted < plain


def test_fitting_and_saving_are_deterministic(tmp_path):
    state = torch.get_rng_state()
    first, second = (
        fit_predictor(model_and_tokenizer(), topics(60), tmp_path / name, epochs=2, hidden=16)
        for name in "ab"
    )
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are not touched
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    tensors = [load_file(tmp_path / name) for name in "ab"]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    other = fit_predictor(model_and_tokenizer(), topics(60), epochs=2, hidden=16, seed=1)
    assert other["loss"] != first["loss"]


def test_scores_are_fast():
    predictor = Predictor(
        token_table(torch.randn(5000, 256)), num_layers=16, num_experts=64, experts_per_token=8
    )
    predictor.scores(list(range(400)))
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        predictor.scores(list(range(400)))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.005


def test_recall_by_hand():
    frequencies = torch.tensor([[[1.0, 0.5, 0.5, 0.0]], [[0.0, 0.0, 1.0, 1.0]]])
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    # the first two serve 1.5 of 2 of the first sequence and nothing of the second, which counts three times
    assert recall(scores, frequencies, torch.tensor([1.0, 3.0]), 2) == pytest.approx(0.75 / 4)
    assert recall(frequencies, frequencies, torch.tensor([1.0, 1.0]), 2) == pytest.approx((0.75 + 1) / 2)


def test_what_a_prediction_is_worth():
    """Sequences that scatter around the prediction as 20 tokens would, and ones that do not scatter."""
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.ones(8), (400, 2))
    scattered = np.array([[generator.dirichlet(20 * 4 * p) for p in layers] for layers in shares])
    logs = torch.tensor(np.log(shares))
    for truth, expected in ((scattered, (14, 20, 28)), (shares, (200,))):
        counts = np.array([[generator.multinomial(160, q) for q in layers] for layers in truth])
        assert worth_in_tokens(logs, torch.tensor(counts), 4) in expected


def test_a_real_trace_of_a_model_given_by_path(tmp_path):
    folder = save(tmp_path / "model")
    made = trace(model_and_tokenizer(), rows(40), tmp_path / "t", progress=False)
    report = fit_predictor(folder, tmp_path / "t", tmp_path / "p", epochs=1)
    assert report["num_sequences"] == made.num_sequences
    assert report["slots"] == 2


def test_a_trace_of_a_tuning_that_is_not_merged(tmp_path):
    """On the command line, where a model is a name: the adapter is one beside it, as for the trace."""
    folder = save(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in rows(20))
    )
    settings = {"max_steps": 2, "rank": 2, "batch_tokens": 128, "max_length": 64, "progress": False}
    melinoe.tune(folder, data, tmp_path / "adapter", router_learning_rate=0.05, **settings)

    def run(*arguments):
        arguments = [str(one) for one in (*arguments, "--adapter", tmp_path / "adapter")]
        return CliRunner().invoke(app, [*arguments, "--model", str(folder), "--quiet"])

    done = run("trace", "--data", data, "--output", tmp_path / "t")
    assert done.exit_code == 0, done.output
    with pytest.raises(MelinoeError, match="other routers"):
        fit_predictor(folder, tmp_path / "t")
    for output, code in (("p", 0), ("adapter/p", 1)):
        done = run("fit-predictor", "--trace", tmp_path / "t", "--output", tmp_path / output)
        assert done.exit_code == code, done.output
    assert melinoe.load(folder, tmp_path / "adapter", tmp_path / "p", slots=2).melinoe_paged.predictor


def test_other_models_and_files_are_refused(tmp_path):
    fit_predictor(model_and_tokenizer(), topics(20), tmp_path / "p", epochs=1)
    other, _ = model_and_tokenizer(1)
    with pytest.raises(MelinoeError, match="other routers"):
        Predictor.load(tmp_path / "p", other)
    with pytest.raises(MelinoeError, match="the trace was made from a model with other routers"):
        fit_predictor(other, topics(20))
    with pytest.raises(MelinoeError, match="too few sequences"):
        fit_predictor(model_and_tokenizer(), topics(5))
    with pytest.raises(MelinoeError, match="no such predictor"):
        Predictor.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not a predictor at all")
    with pytest.raises(MelinoeError, match="is not a predictor file"):
        Predictor.load(tmp_path / "text")
    topics(20).save(tmp_path / "t")
    with pytest.raises(MelinoeError, match="is not a predictor; got melinoe-trace"):
        Predictor.load(tmp_path / "t")
    save_file({"x": torch.zeros(1)}, tmp_path / "v", {"format": "melinoe-predictor", "version": "9"})
    with pytest.raises(MelinoeError, match="another version"):
        Predictor.load(tmp_path / "v")


def test_a_network_that_learns_nothing_gives_way_to_the_global_frequencies(tmp_path):
    """Prompts of two kinds, and answers that do not care: the warning, and a file that says so."""
    generator = np.random.default_rng(0)
    liked = generator.dirichlet(np.ones(8), 2)
    made = topics(120)
    indices = made.indices.copy()
    for token in np.flatnonzero(made.decoded):
        indices[token] = [generator.choice(8, 2, replace=False, p=p) for p in liked]
    report = fit_predictor(
        model_and_tokenizer(), replace(made, indices=indices), tmp_path / "p", slots=4, epochs=60, hidden=64
    )
    assert report["loads_global"] <= report["loads_predictor"] and report["kept"] == "global"
    assert any("global frequencies, which were kept" in text for text in report["warnings"])
    predictor = Predictor.load(tmp_path / "p")
    one, other = predictor.scores([5, 6, 7]), predictor.scores([17, 18])
    assert (one == other).all()
    counted = np.sort(one[0])[::-1] / 2
    assert counted == pytest.approx(np.sort(liked[0])[::-1], abs=0.15)


def test_what_a_network_gains_is_said_without_a_warning(tmp_path):
    report = fit_predictor(model_and_tokenizer(), topics(), tmp_path / "p", slots=4, epochs=40, hidden=32)
    assert report["kept"] == "network" and report["warnings"] == []
    assert report["loads_predictor"] < min(report["loads_global"], report["loads_none"])
    assert report["recall_nearest"] > 0.8  # two kinds of prompts: neighbours know as much


def test_the_verb_prints_the_warning(tmp_path, monkeypatch, capsys):
    from melinoe.cli.main import app

    save(tmp_path / "model")
    topics(40).save(tmp_path / "t")
    report = fit_predictor(model_and_tokenizer(), topics(40), epochs=1)
    text = warnings_of(report | {"kept": "global", "loads_predictor": 3.0, "loads_global": 2.0})
    assert text[0].startswith("the network reads nothing out of prompts: 3.000 loads per token")
    text = warnings_of(report | {"kept": "network", "loads_none": 0.0})
    assert "generate without --predictor" in text[0]
    arguments = ["--model", tmp_path / "model", "--trace", tmp_path / "t", "--output", tmp_path / "p"]
    app(["fit-predictor", *map(str, arguments)], standalone_mode=False)
    out, err = capsys.readouterr()
    shown = [line for line in err.splitlines() if line.startswith("melinoe: ")]
    assert ": network, " in out or shown  # who keeps the global frequencies is told


def test_every_prompt_has_a_horizon_of_its_own(tmp_path):
    """Answers to prompts of one kind have 4 tokens, to those of the other 40."""
    made = topics(200, seed=3)
    lengths = [4 if prompt[0] < 15 else 40 for prompt in made.prompts()]
    rows, tokens = [], []
    for number, prompt in enumerate(made.prompts()):
        row = made.indices[made.sequence == number]
        rows.append(row[np.arange(len(prompt) + lengths[number]) % len(row)])
        tokens.append([*prompt, *[3] * (lengths[number] + 1)])
    mixed = from_sequences(rows, tokens, [len(p) for p in made.prompts()], 8, fingerprint=made.fingerprint)
    fit_predictor(model_and_tokenizer(), mixed, tmp_path / "p", epochs=1)
    predictor = Predictor.load(tmp_path / "p")
    short, long = (predictor.predict(prompt)[1].horizon for prompt in ([6, 9, 12], [16, 19, 22]))
    assert 3 <= short <= 6 and 30 <= long <= 40
    scores, strengths = predictor.predict_all([[6, 9, 12], [16, 19, 22]])
    assert [one.horizon for one in strengths] == [short, long]
    together = mean_prediction([predictor.predict([6, 9, 12]), predictor.predict([16, 19, 22])])
    assert together[1].horizon == (short + long) / 2 and (together[0] == scores.mean(0)).all()

    model = melinoe.load(save(tmp_path / "model"), slots=4, predictor=tmp_path / "p")
    for prompt, horizon in (([6, 9, 12], short), ([16, 19, 22], long)):
        model(torch.tensor([prompt]))
        assert model.melinoe_paged.pager.policy.horizon == horizon


def test_a_prompt_like_none_that_was_seen_is_not_believed(tmp_path):
    """Seen: tokens 5 to 24. A prediction for others is worth less, down to nothing; nothing is preloaded."""
    report = fit_predictor(model_and_tokenizer(), topics(200), tmp_path / "p", epochs=5)
    predictor = Predictor.load(tmp_path / "p")
    seen = [predictor.predict(prompt)[1].tokens for prompt in topics(100, seed=7).prompts()]
    assert np.mean(np.array(seen) == report["prior_tokens"]) > 0.85 and min(seen) > 0
    strange = [40] * 200
    scores, strength = predictor.predict(strange)
    assert strength.tokens < 0.5 * report["prior_tokens"] and np.isfinite(scores).all()
    predictor.familiar /= 10  # now it is stranger than twice what is familiar
    assert predictor.predict(strange)[1].tokens == 0
    policy = DecayedCounts(2, 8, 4)
    policy.begin(scores, predictor.predict(strange)[1])
    assert policy.request(0, prefill_call(np.array([[0, 1]]))).preloads == []


def test_rows_that_all_have_one_prompt(tmp_path):
    made = topics(36)  # 32 of them to fit to: their mean is exact
    rows = [made.indices[made.sequence == number][-16:] for number in range(36)]
    same = from_sequences(rows, [[5, 6, 7, *[3] * 14]] * 36, [3] * 36, 8, fingerprint=made.fingerprint)
    report = fit_predictor(model_and_tokenizer(), same, tmp_path / "p", epochs=1)
    predictor = Predictor.load(tmp_path / "p")
    assert predictor.predict([5, 6, 7])[1].tokens == report["prior_tokens"]
    assert predictor.predict([20, 21])[1].tokens == 0


def test_a_file_of_the_first_version_has_one_horizon_for_all(tmp_path):
    fit_predictor(model_and_tokenizer(), topics(40), tmp_path / "p", epochs=1)
    with safe_open(tmp_path / "p", framework="pt") as file:
        metadata = file.metadata() | {"version": "1"}
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "length"}  # noqa: SIM118
    del metadata["longest"], metadata["familiar"]
    save_file(tensors, tmp_path / "old", metadata)
    old, new = Predictor.load(tmp_path / "old"), Predictor.load(tmp_path / "p")
    assert (old.scores([5, 6]) == new.scores([5, 6])).all()
    assert old.predict([5, 6])[1] == old.strength == new.strength
