"""Settings: what is read, from where, in which order; every wrong one named in full; every "auto" of data resolved."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from finealign.config import (
    ANCHOR_RATE,
    LABEL_PASSES,
    Config,
    DataSettings,
    PredictionSettings,
    TrainingSettings,
    ViewSettings,
    make_config,
    read_config,
    resolve,
    write_config,
)
from finealign.errors import ConfigError

few = settings(max_examples=100, deadline=None)

SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSettings,
    "views": ViewSettings,
    "training": TrainingSettings,
    "prediction": PredictionSettings,
}

# Texts that PyYAML's resolvers or constructors choke on with an error that is no YAMLError.
YAML_TRAPS = ["2001-99-99", "!!int foo", "!!float x", "!!timestamp foo", "!!bool foo", "0x_", "0b_", "1" * 5000]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that hypothesis may write again and again."""
    return tmp_path_factory.mktemp("config") / "settings.yaml"


def from_yaml(text: str, tmp_path: Path, *overrides: str, **flags: Any) -> Config:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, overrides, **flags)


def nested(dotted: str, value: object) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    head, _, rest = dotted.partition(".")
    return {head: nested(rest, value) if rest else value}


def at(config: Config, dotted: str) -> object:
    value: object = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


# --- write_config, read_config: the round trip ------------------------------------------------------------------------

word = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
share = st.floats(0.01, 1)
rate = st.floats(1e-12, 1e12)
count = st.integers(1, 10**12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3),
    max_leaves=6,
)
views_values = st.fixed_dictionaries(
    {
        "crops": count,
        "crop_low": st.floats(0.01, 0.5),
        "crop_high": st.floats(0.5, 1),
        "strong_low": share,
        "randaugment": st.sampled_from(["rand", "rand-m9-mstd0.5-inc1", "rand-n3-m5-p0.3"]),
        "refresh_epochs": st.integers(0, 9) | st.floats(0.01, 0.99) | st.just("auto"),
        "refresh_moved": st.just(0.0) | rate | st.just("auto"),
    }
)
data_values = st.fixed_dictionaries(
    {
        "max_pixels": count,
        "exclude": st.lists(word, max_size=2),
        "white_value": st.just(255.0) | rate.filter(bool) | st.just("auto"),
        "working_size": count | st.just("auto"),
        "cache": word | st.sampled_from(["auto", "temporary"]),
        "cache_gb": st.just(0.0) | rate,
        "workers": st.integers(0, 99) | st.just("auto"),
    }
)
training_values = st.fixed_dictionaries(
    {
        "encoder": st.just("full"),
        "learn": st.sampled_from(["norms+anchors", "norms", "anchors"]),
        "epochs": count | st.just("auto"),
        "steps": count,
        "max_epochs": count,
        "max_images": count | st.sampled_from(["auto", "all"]),
        "block_images": count,
        "batch_size": count,
        "learning_rate": rate,
        "anchor_learning_rate": rate,
        "final_learning_rate": st.just(0.0) | rate,
        "weight_decay": st.just(0.0) | rate,
        "norm_weight_decay": rate,
        "anchor_steps": st.integers(0, 10**6) | st.just("auto"),
        "anchor_batch_size": count,
        "last_label_pass": st.booleans(),
        "checkpoint_minutes": st.just(0.0) | rate,
        "strangers": st.sampled_from(["auto", "off"]),
        "drift_limit": rate.filter(bool) | st.just("off"),
        "strong_views": count,
    }
)


def without_contradictions(values: dict[str, Any]) -> dict[str, Any]:
    """Anchors that cannot take steps of their own are not told to."""
    if values["views"]["refresh_epochs"] == 0 or values["training"]["learn"] == "norms":
        values["training"]["anchor_steps"] = 0
    return values


config_values = st.fixed_dictionaries(
    {
        "backbone": word,
        "seed": st.integers(0, 2**64 - 1),
        "device": word,
        "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        "data": data_values,
        "views": views_values,
        "method": st.fixed_dictionaries({"name": word, "an_option": plain}),
        "training": training_values,
        "prediction": st.fixed_dictionaries(
            {
                "score": st.sampled_from(["auto", "global", "las", "fused"]),
                "calibrate": st.booleans(),
                "class_prior": st.sampled_from(["folder", "even"]),
            }
        ),
    }
).map(without_contradictions)


@settings(max_examples=50, deadline=None)
@given(values=config_values)
def test_write_config__read_back_is_the_same(values: dict[str, Any], scratch: Path) -> None:
    config = make_config(values)
    assert config.model_dump() == values  # nothing is lost, coerced or added on the way in
    write_config(config, scratch)
    assert read_config(scratch) == config


def test_write_config__holds_every_setting(tmp_path: Path) -> None:
    write_config(Config(), tmp_path / "config.yaml")
    found = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert set(found) == set(Config.model_fields)
    for name, section in SECTIONS.items():
        assert set(found[name]) == set(section.model_fields)


def test_write_config__readable_unicode(tmp_path: Path) -> None:
    write_config(make_config({"backbone": "local-dir:/模型/🦉"}), tmp_path / "config.yaml")
    assert "local-dir:/模型/🦉" in (tmp_path / "config.yaml").read_text(encoding="utf-8")


# --- read_config: where a setting comes from --------------------------------------------------------------------------


def test_read_config__nothing_given_is_the_defaults() -> None:
    assert read_config() == Config()


def test_read_config__override_wins_over_file_and_flag_over_both(tmp_path: Path) -> None:
    text = "seed: 1\nbackbone: from/file\ntraining: {epochs: 2, batch_size: 3, steps: 4}\n"
    overrides = ["training.epochs=20", "training.batch_size=30"]
    assert from_yaml(text, tmp_path).training.epochs == 2
    assert from_yaml(text, tmp_path, *overrides).training.epochs == 20
    config = from_yaml(text, tmp_path, *overrides, training__epochs=200, seed=5)
    assert (config.training.epochs, config.training.batch_size, config.training.steps) == (200, 30, 4)
    assert (config.seed, config.backbone) == (5, "from/file")


def test_read_config__the_last_override_wins() -> None:
    assert read_config(None, ["training.epochs=3", "training.epochs=4"]).training.epochs == 4


def test_read_config__a_flag_that_is_none_is_not_there(tmp_path: Path) -> None:
    config = from_yaml("seed: 7\n", tmp_path, "training.epochs=3", seed=None, training__epochs=None, method__name=None)
    assert (config.seed, config.training.epochs, config.method.name) == (7, 3, Config().method.name)


def test_read_config__a_flag_of_zero_counts(tmp_path: Path) -> None:
    assert from_yaml("seed: 7\n", tmp_path, seed=0).seed == 0


@pytest.mark.parametrize(
    ("override", "dotted", "wanted"),
    [
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("training.epochs=auto", "training.epochs", "auto"),
        ("training.epochs= 12 ", "training.epochs", 12),
        ("backbone=local-dir:/a=b/c", "backbone", "local-dir:/a=b/c"),
        ("method.name=zero-shot", "method.name", "zero-shot"),
        ("training={epochs: 3, steps: 9}", "training.steps", 9),
        ("device='cpu'", "device", "cpu"),
    ],
)
def test_read_config__override_value_is_yaml(override: str, dotted: str, wanted: object) -> None:
    assert at(read_config(None, [override]), dotted) == wanted


def test_read_config__method_options_pass_through(tmp_path: Path) -> None:
    text = "method: {name: fair, tau: 0.5, nested: {a: [1, 2]}}\n"
    config = from_yaml(text, tmp_path, "method.weight=margin", method__keep=3)
    assert config.method.name == "fair"
    assert config.method.options == {"tau": 0.5, "nested": {"a": [1, 2]}, "weight": "margin", "keep": 3}
    config.method.options["tau"] = 9  # a copy
    assert config.method.options["tau"] == 0.5


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "\ufeff"])
def test_read_config__an_empty_file_is_the_defaults(text: str, tmp_path: Path) -> None:
    assert from_yaml(text, tmp_path) == Config()


# --- read_config: what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epochs: 3", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("\tseed: 3", "is not YAML"),
        ("--- {}\n--- {}", "is not YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("- seed\n- 3\n", "holds no settings"),
        ("just words", "holds no settings"),
        ("42", "holds no settings"),
        ("1: 2", "holds no settings"),
    ],
)
def test_read_config__not_a_file_of_settings(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_yaml(text, tmp_path)
    assert str(tmp_path / "settings.yaml") in str(caught.value)


def test_read_config__missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No configuration file at .*nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


def test_read_config__a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"backbone: caf\xe9", "seed: 3".encode("utf-16")[:-1], b"\xff\xfe\x00"])
def test_read_config__not_utf8(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        read_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["training.epochs", "", "=3", "=", "training.epochs:3"])
def test_read_config__override_without_key_or_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a setting. Wanted: section\.key=value"):
        read_config(None, [override])


def test_read_config__override_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match=r"--set training\.epochs is not YAML: "):
        read_config(None, ["training.epochs=[3"])


@pytest.mark.parametrize("text", ["training: 5", "training: [epochs]", "training:"])
def test_read_config__a_key_below_a_single_value(text: str, tmp_path: Path) -> None:
    for overrides, flags in ((["training.epochs=3"], {}), ([], {"training__epochs": 3})):
        with pytest.raises(ConfigError, match=r"training\.epochs: 'training' is a single value, not a section"):
            from_yaml(text, tmp_path, *overrides, **flags)


def test_read_config__a_key_below_a_setting_that_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"^seed: found \{'x': 3\}"):
        read_config(None, ["seed.x=3"])
    with pytest.raises(ConfigError, match=r"training\.epochs\.x: 'epochs' is a single value"):
        read_config(None, ["training.epochs=3", "training.epochs.x=4"])


@pytest.mark.parametrize("override", [".=3", "training..epochs=3", "training.=3", ".training=3"])
def test_read_config__empty_key(override: str) -> None:
    with pytest.raises(ConfigError, match="Unknown setting ''"):
        read_config(None, [override])


@pytest.mark.parametrize("trap", [pytest.param(trap, id=trap[:20]) for trap in YAML_TRAPS])
def test_read_config__what_yaml_cannot_construct(trap: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_config(None, [f"seed={trap}"])
    with pytest.raises(ConfigError):
        from_yaml(f"seed: {trap}", tmp_path)


def test_read_config__nested_too_deep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        from_yaml("[" * 1200, tmp_path)


PIECES = r"""training views method seed epochs name : = - [ ] { } , & * ! !! # ' " | > % @ ~ null true .inf .nan 0 1
1e9 1_0 2001-01-01 &a *a << ? --- ... \ auto crops"""
pieces = st.sampled_from(PIECES.split()) | st.sampled_from(
    ["\n", " ", "  ", "\t", ": ", "- ", "\r\n", "\x00", "\u2028", "\x85", "\ufeff", "🦉"]
)
yamlish = st.lists(pieces, max_size=25).map("".join)


@few
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode) | yamlish.map(str.encode))
def test_read_config__any_file_is_settings_or_a_config_error(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content)
    try:
        config = read_config(scratch)
    except ConfigError as error:
        assert str(error).strip()
    else:
        assert isinstance(config, Config)


dotted_keys = st.lists(
    st.sampled_from([*Config.model_fields, *TrainingSettings.model_fields, *ViewSettings.model_fields, "x", ""]),
    max_size=4,
).map(".".join)


@few
@given(overrides=st.lists(st.text(max_size=40) | st.tuples(dotted_keys, yamlish | word).map("=".join), max_size=4))
def test_read_config__any_override_is_a_setting_or_a_config_error(overrides: list[str]) -> None:
    try:
        config = read_config(None, overrides)
    except ConfigError as error:
        assert str(error).strip()
    else:
        assert isinstance(config, Config)


# --- make_config: each wrong setting, named -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "nearest"),
    [
        ("bakbone", "backbone"),
        ("trainig", "training"),
        ("data.max_pixel", "max_pixels"),
        ("views.crop_lo", "crop_low"),
        ("training.epoch", "epochs"),
        ("training.learning_rte", "learning_rate"),
        ("prediction.scores", "score"),
    ],
)
def test_make_config__unknown_key_is_answered_with_the_nearest(dotted: str, nearest: str) -> None:
    section, _, key = dotted.rpartition(".")
    valid = SECTIONS[section].model_fields if section else Config.model_fields
    with pytest.raises(ConfigError) as caught:
        make_config(nested(dotted, 3))
    message = str(caught.value)
    assert message.startswith(f"{dotted}: Unknown setting {key!r}. Did you mean {nearest!r}?")
    assert message.endswith(f"Valid: {', '.join(sorted(valid))}.")


def test_make_config__unknown_key_near_nothing_is_answered_with_all() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"data": {"zzzzzz": 1}})
    assert "Did you mean" not in str(caught.value)
    assert str(caught.value).endswith(f"Valid: {', '.join(sorted(DataSettings.model_fields))}.")


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("backbone", 5),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", None),
        ("device", ["cpu"]),
        ("precision", "fp8"),
        ("data", 3),
        ("data.max_pixels", 0),
        ("data.working_size", "big"),
        ("views.crops", 0),
        ("views.crop_low", 0),
        ("views.crop_low", "half"),
        ("views.crop_high", 1.01),
        ("views.strong_low", -0.1),
        ("views.randaugment", 9),
        ("views.refresh_epochs", -1),
        ("method", "fair"),
        ("method.name", 7),
        ("training", [1]),
        ("training.encoder", "half"),
        ("training.learn", "everything"),
        ("training.epochs", 0),
        ("training.epochs", "never"),
        ("training.batch_size", 2.5),
        ("training.learning_rate", 0),
        ("training.final_learning_rate", -1e-9),
        ("training.weight_decay", {"of": "anchors"}),
        ("prediction.score", "best"),
    ],
)
def test_make_config__wrong_value_is_named_in_full(dotted: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(nested(dotted, value))
    for line in str(caught.value).splitlines():
        assert line.startswith(f"{dotted}: found {value!r}. ")


@pytest.mark.parametrize(
    ("dotted", "choices"),
    [
        ("precision", "auto, fp32, bf16, fp16"),
        ("training.learn", "norms+anchors, norms, anchors"),
        ("prediction.score", "auto, global, las, fused"),
    ],
)
def test_make_config__wrong_choice_lists_the_valid(dotted: str, choices: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(nested(dotted, "something else"))
    assert str(caught.value).endswith(f"Valid: {choices}.")


def test_make_config__every_wrong_setting_has_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"seed": -1, "views": {"crops": 0, "crop": 1}, "trianing": {}})
    starts = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert starts == {"seed", "views.crops", "views.crop", "trianing"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dotted",
    [f"views.{name}" for name in ("crop_low", "crop_high", "strong_low")]
    + [
        f"training.{name}"
        for name in (
            "learning_rate",
            "anchor_learning_rate",
            "final_learning_rate",
            "weight_decay",
            "norm_weight_decay",
            "epochs",
        )
    ],
)
def test_make_config__no_number_is_not_finite(dotted: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(nested(dotted, value))
    assert str(caught.value).startswith(f"{dotted}: found {value!r}. ")


def test_make_config__smallest_crop_above_the_largest() -> None:
    with pytest.raises(ConfigError, match=r"views\.crop_low \(0\.8\) is above views\.crop_high \(0\.7\)"):
        make_config({"views": {"crop_low": 0.8, "crop_high": 0.7}})
    assert make_config({"views": {"crop_low": 0.7, "crop_high": 0.7}}).views.crop_low == 0.7


def test_make_config__leaves_what_it_was_given_alone() -> None:
    values = {"training": {"epochs": "3"}, "method": {"name": "fair", "tau": 1}}
    make_config(values)
    assert values == {"training": {"epochs": "3"}, "method": {"name": "fair", "tau": 1}}


@pytest.mark.parametrize("section", [None, "data", "views", "method", "training", "prediction"])
def test_config__never_changes(section: str | None) -> None:
    config = Config()
    part: BaseModel = getattr(config, section) if section else config
    for name in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, getattr(part, name))


# --- resolve ----------------------------------------------------------------------------------------------------------


# Another machine may have another cache folder and another number of cores: like the device, these are not resolved.
WHERE = {"cache", "workers"}


def autos(config: Config) -> list[str]:
    """Settings of data, views and training that are still "auto", but for those that wait for the machine or images."""
    dump = config.model_dump(exclude={"data": WHERE, "training": {"strangers"}})
    return [
        f"{section}.{key}"
        for section in ("data", "views", "training")
        for key, value in dump[section].items()
        if value == "auto"
    ]


def all_auto(**training: int) -> Config:
    return make_config(
        {
            "data": {"working_size": "auto"},
            "views": {"refresh_epochs": "auto", "crop_low": 0.5, "crop_high": 0.9},
            "training": {"epochs": "auto", **training},
        }
    )


def test_resolve__epochs_come_nearest_to_the_steps() -> None:
    grid = itertools.product([1, 2, 63, 64, 65, 1000, 50_000], [1, 7, 64, 256], [1, 40, 160, 1000], [1, 15, 60])
    for images, batch_size, steps, most in grid:
        config = all_auto(batch_size=batch_size, steps=steps, max_epochs=most)
        epochs = resolve(config, images=images, classes=10, input_size=224).training.epochs
        assert isinstance(epochs, int)
        an_epoch = len(range(0, images, batch_size))
        distance = {passes: abs(passes * an_epoch - steps) for passes in range(1, most + 1)}
        assert distance[epochs] == min(distance.values()), (images, batch_size, steps, most)


@pytest.mark.parametrize("epochs", [*range(1, 30), 60, 100])
def test_resolve__refresh_is_the_shortest_that_keeps_to_the_label_passes(epochs: int) -> None:
    config = all_auto().model_copy(update={"training": TrainingSettings(epochs=epochs)})
    refresh = resolve(config, images=100, classes=10, input_size=224).views.refresh_epochs
    assert isinstance(refresh, int)

    def passes(every: int) -> int:
        return len(range(0, epochs, every))

    assert passes(refresh) <= LABEL_PASSES
    assert refresh == 1 or passes(refresh - 1) > LABEL_PASSES


@pytest.mark.parametrize("crop_low", [0.05, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("input_size", [1, 32, 224, 336, 337])
def test_resolve__the_smallest_crop_fills_the_input(input_size: int, crop_low: float) -> None:
    config = make_config({"data": {"working_size": "auto"}, "views": {"crop_low": crop_low, "crop_high": 1.0}})
    side = resolve(config, images=100, classes=10, input_size=input_size).data.working_size
    assert isinstance(side, int)
    assert side * crop_low >= input_size * (1 - 1e-9)
    assert (side - 1) * crop_low < input_size * (1 + 1e-9)


@pytest.mark.parametrize("images", [1, 10, 100_000])
def test_resolve__leaves_no_auto(images: int) -> None:
    config = all_auto()
    assert autos(config) == [
        "data.white_value",
        "data.working_size",
        "views.refresh_epochs",
        "views.refresh_moved",
        "training.epochs",
        "training.max_images",
        "training.anchor_learning_rate",
        "training.anchor_steps",
    ]
    resolved = resolve(config, images=images, classes=10, input_size=224)
    assert autos(resolved) == ["data.white_value"]  # each image has its own
    assert read_back(resolved) == resolved


def read_back(config: Config) -> Config:
    return make_config(config.model_dump())


@pytest.mark.parametrize("refresh", [0, 1, 7])
@pytest.mark.parametrize("epochs", [1, 500])
def test_resolve__explicit_values_stay(refresh: int, epochs: int) -> None:
    values = {
        "device": "auto",
        "precision": "auto",
        "data": {"working_size": 11},
        "views": {"refresh_epochs": refresh, "refresh_moved": 0.25},
        "training": {
            "epochs": epochs,
            "steps": 3,
            "max_epochs": 2,
            "max_images": "all",
            "batch_size": 5,
            "anchor_learning_rate": 0.5,
            "anchor_steps": 7 if refresh else 0,
        },
        "method": {"name": "fair", "tau": 0.5},
    }
    config = make_config(values)
    assert resolve(config, images=1000, classes=10, input_size=224) == config


def test_resolve__touches_the_autos_alone_and_not_the_original() -> None:
    config, before = all_auto(batch_size=9), all_auto(batch_size=9).model_dump()
    after = resolve(config, images=100, classes=10, input_size=32).model_dump()
    assert config.model_dump() == before
    places = [("data", "working_size"), ("views", "refresh_epochs"), ("training", "epochs"), ("training", "max_images")]
    places += [("views", "refresh_moved"), ("training", "anchor_learning_rate"), ("training", "anchor_steps")]
    for section, key in places:
        assert before[section].pop(key) == "auto"
        assert after[section].pop(key) != "auto"
    assert after == before


def test_resolve__twice_is_once() -> None:
    once = resolve(all_auto(), images=100, classes=10, input_size=224)
    assert resolve(once, images=7, classes=3, input_size=32) == once


@pytest.mark.parametrize(("images", "classes", "share"), [(1000, 10, 1), (500, 10, 1), (250, 10, 0.5), (100, 50, 0.04)])
def test_resolve__anchors_learn_the_slower_the_fewer_images_a_class(images: int, classes: int, share: float) -> None:
    rate = resolve(all_auto(), images=images, classes=classes, input_size=224).training.anchor_learning_rate
    assert rate == pytest.approx(ANCHOR_RATE * share)


@pytest.mark.parametrize("name", ["strangers", "drift_limit"])
def test_read_config__off_without_quotes_is_off(name: str, tmp_path: Path) -> None:
    """YAML reads it as false."""
    file = tmp_path / "config.yaml"
    file.write_text(f"training: {{{name}: off}}", encoding="utf-8")
    assert getattr(read_config(file).training, name) == "off"
    assert getattr(read_config(None, [f"training.{name}=off"]).training, name) == "off"
    with pytest.raises(ConfigError, match=name):
        read_config(None, [f"training.{name}=on"])
