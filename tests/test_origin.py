"""A trace says how sticky its model was and which adapter it had; those who read it say what differs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import melinoe
from families import save_checkpoint
from melinoe.cli.main import app
from melinoe.measure.trace import open_model, trace
from melinoe.models.pretrained import load_model
from melinoe.prediction.fit import fit_predictor
from melinoe.prediction.placement import placement
from melinoe.prediction.predictor import Predictor
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace, joined
from melinoe.sticky.settings import CONFIG_FIELD, Stickiness
from test_identity import further
from test_streaming import save_tuning
from text_model import rows, save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("origin") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_tuning(base, tmp_path_factory.mktemp("origin") / "adapter")


def recorded(base, **how) -> Trace:
    return trace(base, rows(24), progress=False, **how)


def older(made: Trace) -> Trace:
    """As it was written before it said any of this."""
    kept = {name: value for name, value in made.settings.items() if name not in made.origin}
    return replace(made, settings=kept)


def test_a_trace_says_how_its_model_was_run(base, adapter, tmp_path):
    made = recorded(base, sticky=0.3, adapter=adapter, output=tmp_path / "t")
    again = Trace.load(tmp_path / "t")
    assert (
        again.origin
        == made.origin
        == {**made.origin, "sticky": Stickiness(0.3).to_json(), "adapter": str(adapter)}
    )
    assert again.made_by == f"{base} at stickiness 0.3 with the adapter {adapter}"
    plain = recorded(base)
    assert plain.origin == {"sticky": None, "adapter": None, "identity": made.origin["identity"]}
    assert plain.made_by == f"{base} at stickiness 0"
    opened = open_model(base, adapter, sticky=0.2)  # a model that is loaded already knows as much
    loaded = trace(opened, rows(12), progress=False)
    assert loaded.made_by == f"{base} at stickiness 0.2 with the adapter {adapter}"


def test_of_a_store_it_says_the_same(base, adapter, tmp_path):
    melinoe.convert(base, tmp_path / "store", format="int8", progress=False)
    made = recorded(tmp_path / "store", adapter=adapter)
    assert made.origin == recorded(base, adapter=adapter).origin


def test_older_traces_open_and_say_that_they_do_not_know(base, tmp_path):
    older(recorded(base)).save(tmp_path / "t")
    again = Trace.load(tmp_path / "t")
    assert again.origin == {} and again.made_by == f"{base} (how sticky it was is not written down)"
    found = simulate(again, "lru", 2)["trace"]
    assert found == {"model": str(base), "made_by": again.made_by}
    assert not [one for one in fit_predictor(base, again, epochs=1)["warnings"] if "stickiness" in one]


def test_the_verbs_describe_it(base, adapter, tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": row.prompt, "completion": row.completion} for row in rows()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file, words = tmp_path / "t", f"of {base} at stickiness 0.3 with the adapter {adapter}"

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout

    given = (
        "trace",
        "--model",
        base,
        "--data",
        data,
        "--output",
        file,
        "--adapter",
        adapter,
        "--sticky",
        0.3,
    )
    assert words in run(*given, "--quiet")
    found = json.loads(run(*given, "--quiet", "--json"))
    assert found["sticky"]["strength"] == 0.3 and found["adapter"] == str(adapter)
    assert run("simulate", file, "--slots", 2).startswith(f"{file}: {words}\n")
    found = json.loads(run("simulate", file, "--slots", 2, "--json"))["trace"]
    assert found["sticky"]["strength"] == 0.3 and found["adapter"] == str(adapter)
    found = json.loads(run("placement", file, "--output", tmp_path / "p.json", "--json"))
    assert found["sticky"]["strength"] == 0.3 and found["adapter"] == str(adapter)
    assert json.loads((tmp_path / "p.json").read_text()) == found


def test_a_predictor_says_when_it_serves_another_strength(base, tmp_path, capfd):
    at_a_third = recorded(base, sticky=0.3)
    report = fit_predictor(base, at_a_third, tmp_path / "p", epochs=1)
    assert report["sticky"]["strength"] == 0.3 and report["adapter"] is None
    words = "is of a model at stickiness 0.3, this one is at {}: it fits less well"
    assert f"the trace {words.format(0)}" in report["warnings"]
    with safe_open(tmp_path / "p", framework="pt") as file:
        assert json.loads(file.metadata()["origin"]) == at_a_third.origin
    for sticky, said in ((None, "0"), (0.1, "0.1"), (0.3, None)):
        capfd.readouterr()
        model = melinoe.load(base, predictor=tmp_path / "p", slots=2, sticky=sticky)
        error = capfd.readouterr().err
        assert model.melinoe_paged.predictor is not None
        assert (f"melinoe: the predictor {words.format(said)}\n" in error) == (said is not None)
        assert ("fits less well" in error) == (said is not None)


def test_one_that_transformers_opens_says_so_too(base, tmp_path, capfd):
    """A store that is sticky by its config, opened without melinoe.load."""
    fit_predictor(base, recorded(base, sticky=0.3), tmp_path / "p", epochs=1)
    melinoe.convert(base, tmp_path / "store", progress=False)
    config = json.loads((tmp_path / "store" / "config.json").read_text())
    config["quantization_config"] |= {"predictor": str(tmp_path / "p"), "slots": 2}
    for strength, said in ((0.1, True), (0.3, False)):
        config[CONFIG_FIELD] = Stickiness(strength).to_json()
        (tmp_path / "store" / "config.json").write_text(json.dumps(config))
        capfd.readouterr()
        load_model(tmp_path / "store")
        assert ("this one is at 0.1: it fits less well" in capfd.readouterr().err) == said


def test_predictors_from_before_say_nothing(base, tmp_path, capfd):
    fit_predictor(base, older(recorded(base)), tmp_path / "p", epochs=1)
    assert Predictor.load(tmp_path / "p").origin == {}
    melinoe.load(base, predictor=tmp_path / "p", slots=2, sticky=0.5)
    assert "fits less well" not in capfd.readouterr().err


def test_other_weights_behind_the_same_routers_are_said(base, tmp_path, capfd):
    other, made = further(base, tmp_path / "other", ".experts."), recorded(base)
    words = "is of a model with the same routers and other weights in model.layers.0.mlp.experts and 1 more"
    assert any(f"the trace {words}" in one for one in fit_predictor(other, made, epochs=1)["warnings"])
    fit_predictor(base, made, tmp_path / "p", epochs=1)
    melinoe.load(base, predictor=tmp_path / "p", slots=2)
    assert words not in capfd.readouterr().err
    melinoe.load(other, predictor=tmp_path / "p", slots=2)
    assert f"melinoe: the predictor {words}" in capfd.readouterr().err
    [note] = placement(made, tmp_path / "p.pt", format="ktransformers", model=other)["notes"]
    assert f"the trace {words}" in note
    assert placement(made, tmp_path / "p.pt", format="ktransformers", model=base)["notes"] == []
    with pytest.raises(melinoe.MelinoeError, match="the traces are of different models"):
        joined([made, recorded(other)])


def test_strengths_are_not_joined(base):
    one, other = recorded(base), recorded(base, sticky=0.3)
    with pytest.raises(
        melinoe.MelinoeError, match=r"different models; got .* at stickiness 0.3; allowed: .* 0"
    ):
        joined([one, other])
    assert joined([one, older(other), one]).num_sequences == 72


def test_off_is_off_for_those_who_ask_the_config(tmp_path):
    """What a config says and a user has switched off is said of no trace, and saved with no model."""
    folder = save_checkpoint(tmp_path / "model", "olmoe", torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config[CONFIG_FIELD] = Stickiness(0.3).to_json()
    (folder / "config.json").write_text(json.dumps(config))
    for strength, stays in ((None, True), (0, False)):
        model, _ = open_model(folder, sticky=strength)
        assert (CONFIG_FIELD in model.config.to_dict()) == stays
