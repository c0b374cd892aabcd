"""The demo's world: anatomy, species, painting, the folder it is drawn into, the model that ships, and its recipe."""

import csv
import importlib.util
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finealign.demo import model
from finealign.demo.birds import COLOURS, SILHOUETTES, VALUES, Part, Pose, Traits, anatomy, random_pose
from finealign.demo.model import demo_model
from finealign.demo.painting import SIZE, paint
from finealign.demo.species import GENUS_SIZE, SPECIES, describe, telling_traits
from finealign.demo.world import World, make_world
from finealign.errors import ModelError
from finealign.evaluate.truth import read_truth

RECIPE = Path(__file__).parents[1] / "recipes" / "demo_model.py"
PLUMAGE = ("silhouette", "body", "wing", "belly", "cap")
birds = st.builds(Traits, **{name: st.sampled_from(values) for name, values in VALUES.items()})
seeds = st.integers(0, 2**32)


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def drawn(parts: list[Part], *names: str) -> list[tuple[str, str, list[list[float]]]]:
    return [(part.name, part.colour, part.points.tolist()) for part in parts if part.name in names]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- anatomy ----------------------------------------------------------------------------------------------------------


@given(bird=birds, seed=seeds)
def test_anatomy__every_part_is_a_finite_polygon_of_a_known_colour(bird: Traits, seed: int) -> None:
    for part in anatomy(bird, random_pose(np.random.default_rng(seed))):
        assert part.points.ndim == 2 and part.points.shape[0] >= 3 and part.points.shape[1] == 2
        assert np.isfinite(part.points).all()
        assert np.abs(part.points).max() < 3
        assert part.colour in COLOURS


@pytest.mark.parametrize(
    ("trait", "parts"),
    [
        ("beak", {"beak"}),
        ("beak_colour", {"beak"}),
        ("crest", {"crest"}),
        ("wing_bars", {"wing bar"}),
        ("eye_ring", {"eye ring"}),
        ("tail", {"tail"}),
        ("breast", {"breast"}),
        ("legs", {"leg", "foot"}),
        ("cap", {"cap", "crest"}),
    ],
)
@given(bird=birds, seed=seeds, data=st.data())
@settings(max_examples=25)
def test_anatomy__a_trait_changes_its_own_parts_and_no_other(
    trait: str, parts: set[str], bird: Traits, seed: int, data: Any
) -> None:
    other = data.draw(st.sampled_from([value for value in VALUES[trait] if value != getattr(bird, trait)]))
    pose = random_pose(np.random.default_rng(seed))
    before, after = anatomy(bird, pose), anatomy(replace(bird, **{trait: other}), pose)
    rest = {part.name for part in before + after} - parts
    assert drawn(before, *rest) == drawn(after, *rest)
    assert drawn(before, *parts) != drawn(after, *parts)


@pytest.mark.parametrize("silhouette", SILHOUETTES)
def test_anatomy__the_bird_looks_right_and_stands_on_its_feet(silhouette: str) -> None:
    parts = anatomy(replace(SPECIES[0][1], silhouette=silhouette), Pose())
    middle = {part.name: part.points.mean(0) for part in parts}
    assert middle["beak"][0] > middle["eye"][0] > middle["body"][0] > middle["tail"][0]
    assert middle["foot"][1] > middle["leg"][1] > middle["body"][1] > middle["eye"][1]


# --- species ----------------------------------------------------------------------------------------------------------


def test_species__are_eight_genera_of_three_that_share_their_plumage() -> None:
    assert len(SPECIES) == 24 and len({name for name, _ in SPECIES}) == 24 and len({t for _, t in SPECIES}) == 24
    genera = [[bird for _, bird in SPECIES[i : i + GENUS_SIZE]] for i in range(0, 24, GENUS_SIZE)]
    assert len({genus[0].silhouette for genus in genera}) == 8
    for genus in genera:
        for one in genus:
            assert all(getattr(one, trait) == getattr(genus[0], trait) for trait in PLUMAGE)
            for other in genus:
                apart = [trait for trait, value in asdict(one).items() if value != getattr(other, trait)]
                assert one == other or 1 <= len(apart) <= 2


@pytest.mark.parametrize("index", range(24))
def test_describe__eight_sentences_name_the_species_and_tell_it_from_its_siblings(index: int) -> None:
    name, bird = SPECIES[index]
    sentences = describe(index)
    assert len(sentences) == len(set(sentences)) == 8
    assert all(name in sentence and sentence.endswith(".") and "none" not in sentence for sentence in sentences)
    text = " ".join(sentences).replace(name, "")
    assert not [article for article in (" a orange", " a upright", " a eye") if article in text]
    for trait in telling_traits(index):
        value = getattr(bird, trait)
        assert ("no " if value == "none" else "fan-shaped" if value == "fan" else value) in text
    first = index - index % GENUS_SIZE
    for other in set(range(first, first + GENUS_SIZE)) - {index}:
        assert text != " ".join(describe(other)).replace(SPECIES[other][0], "")


# --- painting and the world -------------------------------------------------------------------------------------------


def test_paint__comes_from_its_generator_alone() -> None:
    def painted(seed: int) -> bytes:
        return paint(SPECIES[4][1], np.random.default_rng(seed)).tobytes()

    random.seed(0)
    first = painted(1)
    random.seed(1)
    np.random.seed(1)
    assert painted(1) == first != painted(2)
    assert paint(SPECIES[4][1], np.random.default_rng(1)).size == (SIZE, SIZE)


def test_paint__shows_the_bird() -> None:
    """A red bird and a green one in the same pose and place differ where the bird is, and the first is redder."""
    red, green = (
        np.asarray(
            paint(Traits(**{**asdict(SPECIES[0][1]), "body": c, "wing": c, "belly": c}), np.random.default_rng(5))
        )
        for c in ("red", "green")
    )
    differs = (red.astype(int) != green).any(-1)
    assert 0.03 < differs.mean() < 0.6
    assert red[differs][:, 0].mean() > green[differs][:, 0].mean() + 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("demo") / "world", seed=3, unlabelled=50, test=26)


def test_make_world__draws_every_species_equally_often_in_an_order_that_tells_nothing(world: World) -> None:
    rows = rows_of(world.hidden) + rows_of(world.truth)
    labels = [row["label"] for row in rows]
    assert len(rows) == 76 and {labels.count(name) for name in world.classes} == {3, 4}
    assert labels[:24] != list(world.classes)
    assert all((world.truth.parent / row["path"]).is_file() for row in rows)
    assert sorted(path.name for path in world.unlabelled.iterdir()) == [f"{i:05d}.png" for i in range(50)]
    assert list(world.descriptions) == list(world.classes) == [name for name, _ in SPECIES]
    assert len(read_truth(world.truth, world.classes).paths) == 26


def test_make_world__is_the_same_for_the_same_seed(world: World, tmp_path: Path) -> None:
    again = make_world(tmp_path / "again", seed=3, unlabelled=50, test=26)
    other = make_world(tmp_path / "other", seed=4, unlabelled=2, test=1)
    for path in sorted(world.unlabelled.iterdir()):
        assert path.read_bytes() == (again.unlabelled / path.name).read_bytes()
    assert world.truth.read_text() == again.truth.read_text()
    assert (other.unlabelled / "00000.png").read_bytes() != (again.unlabelled / "00000.png").read_bytes()


def test_make_world__draws_the_bird_that_the_truth_names(world: World) -> None:
    row = rows_of(world.truth)[0]
    expected = paint(dict(SPECIES)[row["label"]], np.random.default_rng((3, 50)))
    with Image.open(world.truth.parent / row["path"]) as found:
        assert found.tobytes() == expected.tobytes()


def test_make_world__touches_no_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        make_world(tmp_path, seed=0, unlabelled=1, test=1)


# --- the model that ships ---------------------------------------------------------------------------------------------


def test_demo_model__is_a_small_transformer_with_layer_norms_that_reads_every_description() -> None:
    from torch import nn

    from finealign.backbone.load import load_backbone
    from finealign.texts.prompts import make_texts

    backbone = load_backbone(demo_model())
    assert (model.WEIGHTS / "open_clip_model.safetensors").stat().st_size <= 20 * 2**20
    assert any(isinstance(module, nn.LayerNorm) for module in backbone.model.visual.modules())
    assert not backbone.convolutional
    names = [name for name, _ in SPECIES]
    features = backbone.encode_texts(make_texts(names, {name: describe(i) for i, name in enumerate(names)}, None))
    assert features.descriptions.shape[0] == 24 * 8


def test_demo_model__refuses_weights_that_are_not_the_ones_that_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = (model.WEIGHTS / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(torn[:-1] + bytes([torn[-1] ^ 1]))
    monkeypatch.setattr(model, "WEIGHTS", tmp_path)
    with pytest.raises(ModelError, match="damaged"):
        demo_model()
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        demo_model()


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_recipe__never_draws_a_species_and_never_writes_its_name(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = iter([SPECIES[0][1], SPECIES[23][1], PLAIN])
    monkeypatch.setattr(recipe, "random_traits", lambda rng: next(offered))
    assert recipe.unknown_bird(np.random.default_rng(0)) == PLAIN
    said = random.Random(0)
    names = {recipe.invented_name(said) for _ in range(3000)}
    assert len(names) > 1000 and not names & {name for name, _ in SPECIES}
    assert "watercolour" not in recipe.STYLES and "paint" not in vars(recipe)


PLAIN = replace(SPECIES[0][1], body="pink", legs="blue")


@given(bird=birds, seed=seeds)
def test_recipe__captions_say_what_is_true(recipe: ModuleType, bird: Traits, seed: int) -> None:
    """Each trait's words name its value, and a caption names no colour that the bird has not."""
    for trait, value in asdict(bird).items():
        word = recipe.word(trait, value, random.Random(seed))
        shown = "fan-shaped" if value == "fan" else value
        absent = {"none": ("no", "plain", "bare"), "one": ("one", "single"), "two": ("two", "double")}
        accepted = absent.get(
            value, (shown, *(["spots"] if value == "spotted" else ["band"] if value == "banded" else []))
        )
        assert any(known in word for known in accepted), (trait, value, word)
    colours = set(COLOURS) & set(asdict(bird).values())
    caption = recipe.caption(bird, random.Random(seed))
    assert not {word for word in COLOURS if f" {word} " in f" {caption.replace(',', ' ')} "} - colours


def test_recipe__runs_to_a_model_that_loads(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finealign.backbone.load import load_backbone

    plan = ["--pool", "12", "--steps", "4", "--words", "2", "--batch", "6"]
    monkeypatch.setattr(sys, "argv", ["demo_model.py", "--out", str(tmp_path / "weights"), *plan])
    monkeypatch.setattr(recipe, "HELD_OUT", 8)
    recipe.main()
    backbone = load_backbone(f"local-dir:{tmp_path / 'weights'}")
    shipped = load_backbone(demo_model())
    assert {k: v.shape for k, v in backbone.model.state_dict().items()} == {
        k: v.shape for k, v in shipped.model.state_dict().items()
    }
