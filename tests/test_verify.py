"""`finealign doctor --verify`: a backbone by the cosines of drawn pictures and their names."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from finealign.backbone.load import load_backbone
from finealign.backbone.verify import SENTENCES, TOLERANCE, Cosines, measure, pictures, read, recorded
from finealign.errors import BackboneError
from test_cli import command, only_json


@pytest.fixture(scope="module")
def tiny(tiny_backbone: Callable[[str], str]) -> str:
    return tiny_backbone("transformer")


def test_pictures__one_of_each_shape_and_colour() -> None:
    drawn = [np.array(picture) for picture in pictures()]
    assert len(drawn) == len(SENTENCES) == len({picture.tobytes() for picture in drawn}) == 12
    for picture, sentence in zip(drawn, SENTENCES, strict=True):
        assert picture[0, 0].tolist() == [255, 255, 255]
        red, green, blue = picture[112, 112].tolist()
        strongest = {"red": red > green + blue, "green": green > max(red, blue), "blue": blue > max(red, green)}
        assert strongest.get(sentence.split()[1], min(red, green) > 200 > 100 > blue), sentence


def test_measure__is_the_cosine_of_picture_and_sentence(tiny: str) -> None:
    backbone = load_backbone(tiny)
    found = measure(backbone)
    text = normalize(backbone.encode_sentences(SENTENCES[5:6]), dim=1)
    image = torch.from_numpy(np.array(backbone.geometry(pictures()[2])))
    seen = normalize(backbone.embed(image.permute(2, 0, 1)[None]), dim=1)
    assert found.cosines[2][5] == pytest.approx(float((seen @ text.T).item()), abs=1e-4)
    assert found.checksum == backbone.checksum


def test_named__counts_the_diagonal() -> None:
    right = np.eye(12)
    right[3] = np.roll(right[3], 1)
    assert Cosines("a", "b", tuple(map(tuple, right.tolist()))).named == 11


def test_verify__says_that_nobody_has_recorded_it(tiny: str) -> None:
    assert recorded("ViT-B-32-quickgelu/openai") is None  # the day it is recorded, the next test's kind is due for it
    assert "Nobody has recorded" in command("doctor", "--verify", "--backbone", tiny).stdout
    found = only_json(command("doctor", "--verify", "--backbone", tiny, "--json"))
    assert (found["recorded"], found["difference"], found["pictures"]) == (False, None, 12)


def test_verify__the_same_weights_agree_and_others_do_not(tiny: str, tmp_path: Path) -> None:
    kept = tmp_path / "cosines.json"
    assert command("doctor", "--verify", "--backbone", tiny, "--record", str(kept)).exit_code == 0
    same = command("doctor", "--verify", "--backbone", tiny, "--against", str(kept))
    assert same.exit_code == 0
    assert "The weights are the same." in same.stdout
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tiny.removeprefix("local-dir:")).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "open_clip_model.safetensors")
    name = next(name for name in weights if name.startswith("visual") and weights[name].is_floating_point())
    save_file(weights | {name: weights[name].roll(1, 0)}, other / "open_clip_model.safetensors")
    differs = command("doctor", "--verify", "--backbone", f"local-dir:{other}", "--against", str(kept))
    assert differs.exit_code == 1
    assert "not what was recorded" in differs.stderr
    assert "not the same file" in differs.stderr


def test_difference__is_the_largest(tiny: str) -> None:
    found = measure(load_backbone(tiny))
    moved = np.array(found.cosines)
    moved[4, 7] += 3 * TOLERANCE
    assert found.difference(replace(found, cosines=tuple(map(tuple, moved.tolist())))) == pytest.approx(3 * TOLERANCE)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"identifier": "a", "checksum": "b", "cosines": [[1]]}', '{"cosines": "x"}', "null"],
)
def test_read__other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(BackboneError, match="--record"):
        read(tmp_path / "a.json")


def test_read__not_a_number_is_refused(tmp_path: Path) -> None:
    rows = [[float("nan")] * 12] * 12
    (tmp_path / "a.json").write_text(
        json.dumps({"identifier": "a", "checksum": "b", "cosines": rows}), encoding="utf-8"
    )
    with pytest.raises(BackboneError, match="--record"):
        read(tmp_path / "a.json")


def test_verify__options_without_it_are_refused(tmp_path: Path) -> None:
    refused = command("doctor", "--record", str(tmp_path / "a.json"))
    assert refused.exit_code == 1
    assert "--verify" in refused.stderr
