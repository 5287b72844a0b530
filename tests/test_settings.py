"""Settings: round trips, sentences for mistakes, identity."""

from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, strategies as st

from mocokit import recipes, settings
from mocokit.errors import UserError
from mocokit.settings import flatten, from_yaml, legacy, methods, replace, to_yaml
from mocokit.settings.schema import Settings
from mocokit.settings.section import setting

EVERY = dict(settings.fields())


def test_every_setting_has_a_meaning_and_a_default():
    for path, field in EVERY.items():
        assert field.description, path
        assert not field.is_required(), path


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_yaml_round_trip(name):
    ours = recipes.by_name(name)
    text = settings.to_yaml(ours, {"lr": 0.1})
    assert settings.from_yaml(text) == ours
    assert "resolved:\n  lr: 0.1" in text


@given(st.floats(1e-6, 1e3), st.integers(1, 10**7), st.booleans(), st.sampled_from([None, 7]))
def test_any_value_survives_the_file(temperature, queue, symmetric, micro):
    changes = {
        "method.temperature": temperature,
        "method.queue_size": queue,
        "method.symmetric": symmetric,
        "train.micro_batch": micro,
    }
    ours = settings.replace(Settings(), changes)
    assert settings.from_yaml(settings.to_yaml(ours)) == ours
    assert {p: settings.get(ours, p) for p in changes} == changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method.temprature": 1}, r"method.temprature does not exist; did you mean method.temp"),
        ({"temperature": 1}, r"did you mean method.temperature"),
        ({"nonsense": 1}, r"--show"),
        ({"method.temperature": -1}, r"method.temperature = -1: input should be greater than 0"),
        ({"method.temperature": float("nan")}, r"method.temperature = nan: .*finite"),
        ({"train.epochs": "many"}, r"train.epochs = 'many': input should be a valid integer"),
        ({"train.epochs": 1.5}, r"train.epochs = 1.5"),
        ({"views.order": ["crop", "blr"]}, r"views.order = 'blr': input should be 'crop'"),
        ({"views.order": ["flip", "crop"]}, r"must begin with crop"),
        ({"views.order": ["crop", "flip", "flip"]}, r"twice"),
        ({"views.crop_area": [0.5, 0.1]}, r"crop_area must be two numbers, 0 < low <= high"),
        ({"views.crop_area": [0.5, 2.0]}, r"crop_area cannot exceed 1"),
        ({"monitor.resize": 100}, r"monitor.resize 100 cannot be smaller than views.size 224"),
        ({"views.resize": 64}, r"views.resize does not exist any more; monitor.resize is"),
        ({"views.std": [0, 1, 1]}, r"views.std = 0: input should be greater than or equal"),
        ({"optim.drops": [0.8, 0.6]}, r"drops must be rising"),
        ({"data.workers": -1}, r"data.workers = -1: input should be greater than or equal to 0$"),
        ({"engine.compile": "maybe"}, r"engine.compile = 'maybe'"),
        ({"seed": -1}, r"seed = -1"),
    ],
)
def test_a_mistake_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        settings.replace(Settings(), changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("crop_area", 0.3, 0.8), ("crop_ratio", 0.5, 2.0), ("blur_sigma", 0.1, 3.0)],
)
def test_two_bounds_are_a_low_and_a_high_one(name, low, high):
    def both(*bounds):
        return getattr(settings.replace(Settings(), {f"views.{name}": bounds}).views, name)

    assert both(low, high) == (low, high) and both(low, low) == (low, low)
    with pytest.raises(UserError, match=f"views.{name} must be two numbers, 0 < low <= high"):
        both(high, low)
    for wrong in ((0, high), (-low, high), (low,), (low, low, high)):
        with pytest.raises(UserError, match=f"views.{name}"):
            both(*wrong)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {epoch: 3}", "train.epoch does not exist; did you mean train.epochs"),
        ("[1, 2]", "must hold settings by name"),
        ("a: [", "is not YAML"),
        ("a: 1\nb: ]", "is not YAML: .* in line 2"),
        ("train: 3", "train = 3"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        settings.load(path)
    assert "mine.yaml" in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.yaml"):
        settings.load(tmp_path / "none.yaml")


def test_assignments_are_read_as_yaml():
    got = settings.parse_assignments(
        ["a.b=1e-3", "c=[1, 2]", "d=null", "e=text", "f=true", "g=a=b", "h="]
    )
    assert got == {
        "a.b": 1e-3,  # YAML 1.1 would take it for text
        "c": [1, 2],
        "d": None,
        "e": "text",
        "f": True,
        "g": "a=b",
        "h": None,
    }
    for bad in ("epochs", "=3", "a=[", "a='", "a=[] []"):
        with pytest.raises(UserError, match="--set"):
            settings.parse_assignments([bad])


def test_places_are_not_identity():
    identity = settings.identity(Settings())
    places = {path for path, field in EVERY.items() if settings.is_incidental(field)}
    assert identity.keys() == EVERY.keys() - places - settings.LABELS
    assert {"engine.device", "data.path", "data.workers", "save.keep", "recipe"}.isdisjoint(
        identity
    )
    assert {"seed", "engine.precision", "method.queue_size", "data.last"} <= identity.keys()


def test_stated_in_lists_the_paths_of_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\ntrain: {epochs: 2}\nresolved: {lr: 3}\n")
    assert settings.stated_in(path) == {"seed", "train.epochs"}


@pytest.mark.parametrize("recipe", ["endtoend_cifar10", "memorybank_softmax_cifar10", "mocov2plus"])
def test_what_belongs_to_no_method_of_0_1_is_dropped(recipe):
    """0.1 wrote every setting of every method; those of other methods had no effect."""
    now = recipes.by_name(recipe)
    old = yaml.safe_load(to_yaml(now))
    others = {name: 7 for name in legacy.METHOD_0_1 - old["method"].keys()}
    old["method"] = {**others, **old["method"]}
    assert from_yaml(yaml.safe_dump(old)) == now


def test_what_a_person_wrote_into_a_file_is_not_dropped():
    with pytest.raises(UserError, match="config.yaml: method.momentum does not exist"):
        from_yaml("method: {name: simclr, momentum: 0.9}")
    assert from_yaml("method: {name: simclr, queue_size: null}").method.name == "simclr"


def test_another_method_keeps_what_both_have():
    settings = replace(recipes.memorybank(), {"method.name": "moco", "method.queue_size": 64})
    assert settings.method.temperature == 0.07 and settings.method.queue_size == 64
    assert settings.method.loss == "info_nce"  # nce is the bank's alone
    again = replace(settings, {"method.queue_size": None, "method.name": "simclr"})
    assert again.method.name == "simclr" and not hasattr(again.method, "queue_size")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_method_that_settings_have_may_be_named(name):
    """Some values are right only together with others: enqueue=one is with symmetric=true."""
    settings = recipes.RECIPES[name]()
    assert replace(settings, {"method.name": settings.method.name}) == settings


def test_values_that_are_right_together_are_kept_together():
    settings = replace(Settings(), {"method.symmetric": True, "method.enqueue": "one"})
    again = replace(settings, {"method.name": "moco", "method.queue_size": 64}).method
    assert (again.symmetric, again.enqueue, again.queue_size) == (True, "one", 64)
    bank = {"method.name": "memorybank", "method.bank_negatives": 9, "method.loss": "nce"}
    settings = replace(Settings(), bank)
    again = replace(settings, {"method.name": "memorybank", "method.bank_momentum": 0.1}).method
    assert (again.bank_negatives, again.loss, again.bank_momentum) == (9, "nce", 0.1)


class ForeignSettings(methods.MethodSettings):
    temperature: float = setting(0.5, "in degrees")


def test_what_equal_names_mean_is_known_of_own_methods_alone(monkeypatch):
    monkeypatch.setitem(methods._outside, "here:It", SimpleNamespace(settings=ForeignSettings))
    before = replace(recipes.mocov1(), {"method.group_size": 8})
    there = replace(before, {"method.name": "here:It"})
    assert (there.method.temperature, there.method.group_size) == (0.5, 8)
    back = replace(there, {"method.temperature": 300.0, "method.name": "moco"})
    assert back.method.temperature == 300.0  # stated
    assert replace(there, {"method.name": "moco"}).method.temperature == 0.2


def test_settings_of_an_outside_method_are_its_own(monkeypatch):
    """A class without settings of its own has those that all methods share, and no more."""
    only = SimpleNamespace(settings=methods.MethodSettings)
    monkeypatch.setitem(methods._outside, "here:Plain", only)
    with pytest.raises(UserError) as caught:
        replace(Settings(), {"method.name": "here:Plain", "method.queue_size": 5})
    said = str(caught.value)
    assert "method.queue_size does not exist" in said and "did you mean method.queue" not in said


def test_a_scoring_view_has_the_bounds_of_any_view():
    """By `monitor.centre` it may be ten times the size."""
    assert replace(Settings(), {"views.size": 1638, "monitor.centre": 0.1})
    for centre, size, side in ((0.1, 1640, "16,400"), (0.12, 2048, "17,067")):
        with pytest.raises(UserError, match=f"scoring view of {side} pixels"):
            replace(Settings(), {"views.size": size, "monitor.centre": centre})
    stated = {"views.size": 2048, "monitor.centre": 0.1, "monitor.resize": 2048}
    assert replace(Settings(), stated).monitor.resize == 2048


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"net.predictor": True, "method.name": "simclr"}, "net.predictor must be"),
        ({"views.crop_area": [0.5, 2.0]}, "views.crop_area cannot exceed 1"),
        ({"optim.drops": [0.9, 0.1]}, "optim.drops must be"),
        ({"method.symmetric": False, "method.enqueue": "one"}, "method.enqueue = 'one' needs"),
        ({"method.groups": 0}, "method.groups = 0: input should be"),
    ],
)
def test_messages_name_the_full_path_once(changes, path):
    with pytest.raises(UserError) as caught:
        replace(recipes.mocov2(), changes)
    sentence = str(caught.value)
    assert sentence.startswith(f"setting: {path}") and ": :" not in sentence


def test_methods_from_outside_are_kept_and_never_imported():
    text = "method: {name: 'no_such_module:Method', group_size: 8, depth: 3}"
    settings = from_yaml(text)
    assert settings.method.name == "no_such_module:Method" and settings.method.group_size == 8
    assert from_yaml(to_yaml(settings)) == settings
    assert flatten(settings)["method.depth"] == 3


def test_names_that_are_no_methods_are_one_sentence():
    for text in ("{name: [a]}", "{name: 3}", "null", "{name: other}"):
        with pytest.raises(UserError, match="config.yaml: method") as caught:
            from_yaml(f"method: {text}")
        assert "method.must" not in str(caught.value)


def test_a_change_of_method_is_checked_with_all_other_changes():
    changes = {"method.name": "simclr", "net.predictor": False}
    assert replace(recipes.mocov2plus(), changes).method.name == "simclr"
    with pytest.raises(UserError, match="net.predictor must be false"):
        replace(recipes.mocov2plus(), {"method.name": "simclr"})
    with pytest.raises(UserError, match="method.queue_siz does not exist; did you mean"):
        replace(recipes.mocov2(), {"method.queue_siz": 3})
    with pytest.raises(UserError) as caught:
        from_yaml("method: {name: simclr, temprature: 3}")
    assert "did you mean method.temperature" in str(caught.value)
