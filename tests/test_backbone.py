"""The room that knows open_clip: identifiers, encoding, what may be trained, saving; held against open_clip itself."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from conftest import CLASSES, HANG, TEXT_TOWER, VISION_TOWERS
from finealign.backbone import model as room
from finealign.backbone.identifiers import OPENAI
from finealign.backbone.load import list_backbones, load_backbone
from finealign.backbone.model import OpenClipBackbone
from finealign.config import DEFAULT_BACKBONE
from finealign.errors import BackboneError
from finealign.method.alignment import saliency_pooled
from finealign.types import Gaze, Texts

Tiny = Callable[[str], str]
TOWERS = ["transformer", "convolutional"]
TRANSFORMER_NORMS = {
    f"{layer}.{kind}"
    for layer in (
        "ln_pre",
        "transformer.resblocks.0.ln_1",
        "transformer.resblocks.0.ln_2",
        "transformer.resblocks.1.ln_1",
        "transformer.resblocks.1.ln_2",
        "ln_post",
    )
    for kind in ("weight", "bias")
}
PREPROCESSING: dict[str, dict[str, Any]] = {
    "halves": {},
    "clip": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    "squash": {"resize_mode": "squash", "interpolation": "bilinear"},
    "longest": {"resize_mode": "longest", "fill_color": 7},
}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny architecture in open_clip's own registry, so that ``ARCH/random`` need not build a large one."""
    path = tmp_path_factory.mktemp("architecture") / "finealign-tiny-quickgelu.json"
    described = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION_TOWERS["transformer"]}
    path.write_text(json.dumps(described | {"text_cfg": TEXT_TOWER}), encoding="utf-8")
    open_clip.add_model_config(path)
    return path.stem


def pictures(count: int, seed: int = 0) -> Tensor:
    """(count, 3, 32, 32) uint8."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def picture(height: int = 47, width: int = 61) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def texts(*descriptions: tuple[str, ...], templates: tuple[str, ...] = ("a photo of a {}.",)) -> Texts:
    return Texts(tuple(CLASSES[: len(descriptions)]), descriptions, templates)


def copy_of(identifier: str, folder: Path, **preprocess: Any) -> Path:
    """The tiny backbone in another folder, with other preprocessing where asked."""
    source = Path(identifier.removeprefix("local-dir:"))
    folder.mkdir()
    described = json.loads((source / "open_clip_config.json").read_text(encoding="utf-8"))
    described["preprocess_cfg"] |= preprocess
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "open_clip_model.safetensors").write_bytes((source / "open_clip_model.safetensors").read_bytes())
    return folder


def mismatched_pairs() -> list[tuple[str, str]]:
    def quick(found: Any) -> bool:
        return bool((found or {}).get("quick_gelu", False))

    return [
        (name, tag)
        for name, tag in open_clip.list_pretrained()
        if quick(open_clip.get_pretrained_cfg(name, tag)) != quick(open_clip.get_model_config(name))
    ]


# --- identifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identifier", ["ViT-B-32", "openai", ""])
def test_load_backbone__no_slash(identifier: str) -> None:
    with pytest.raises(BackboneError, match=rf"'{identifier}' names no weights.*ARCH/PRETRAINED.*finealign models"):
        load_backbone(identifier)


# What is given, and what the message says to type.
MEANT = {
    "VIT-B-32-quickgelu/openai": "Did you mean ViT-B-32-quickgelu/openai?",
    "vit-b-32/openai": "Did you mean ViT-B-32-quickgelu/openai?",
    "ViT-B-32::openai": "Did you mean ViT-B-32-quickgelu/openai?",
    "ViT-B/32/openai": "Did you mean ViT-B-32-quickgelu/openai?",
    "ViT-B/32": "Did you mean ViT-B-32-quickgelu/openai or",
    "vit_b_32": "Did you mean ViT-B-32-quickgelu/openai or",
    "ViT-L/14@336px": "Did you mean ViT-L-14-336-quickgelu/openai?",
    "ViT-B-33/openai": "Unknown architecture 'ViT-B-33'.*Did you mean 'ViT-B-32-quickgelu/openai'?",
    "openai/clip-vit-base-patch32": "for transformers.*The same weights are ViT-B-32-quickgelu/openai: type that",
    "openai/clip-vit-large-patch14-336": "The same weights are ViT-L-14-336-quickgelu/openai: type that",
    "hf-hub:openai/clip-vit-base-patch16": "The same weights are ViT-B-16-quickgelu/openai: type that",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "type hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "some/where": "type hf-hub:some/where.*A folder is named by local-dir:FOLDER",
    "hf:some/where": "Type hf-hub:some/where",
    "https://huggingface.co/some/where": "Type hf-hub:some/where",
    "local_dir:some/where": "Type local-dir:some/where",
    "./some/where": "looks like a folder, but there is none",
}


@pytest.mark.parametrize("identifier", MEANT)
def test_load_backbone__what_is_not_known_is_told_with_what_to_type(identifier: str) -> None:
    with pytest.raises(BackboneError, match=MEANT[identifier].replace("?", r"\?")) as caught:
        load_backbone(identifier)
    assert "ViT-S-32" not in str(caught.value)


def test_load_backbone__what_is_told_to_type_for_openais_weights_is_there() -> None:
    assert set(OPENAI.values()) <= set(list_backbones())


def test_load_backbone__a_bare_folder(tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tiny_backbone("transformer").removeprefix("local-dir:"))
    with pytest.raises(BackboneError, match=f"is a folder. Type local-dir:{folder}"):
        load_backbone(str(folder))
    monkeypatch.chdir(folder.parent)
    with pytest.raises(BackboneError, match=f"is a folder. Type local-dir:{folder.name}"):
        load_backbone(folder.name)
    around = tmp_path / "around"
    shutil.copytree(folder, around / "model")
    with pytest.raises(BackboneError, match=rf"not there.*There is one in local-dir:{around}/model"):
        load_backbone(f"local-dir:{around}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"is a folder.*open_clip_config.json is not there.*for transformers"):
        load_backbone(str(tmp_path))
    with pytest.raises(BackboneError, match=r"is a file. Wanted: local-dir:FOLDER"):
        load_backbone(str(tmp_path / "config.json"))


def test_load_backbone__an_unknown_tag_lists_the_valid_ones() -> None:
    with pytest.raises(BackboneError, match=r"for ViT-B-32-quickgelu 'opnai'. Did you mean 'openai'\?") as caught:
        load_backbone("ViT-B-32-quickgelu/opnai")
    listed = str(caught.value).partition("Valid: ")[2].removesuffix(".").split(", ")
    assert set(listed) == {*open_clip.list_pretrained_tags_by_model("ViT-B-32-quickgelu"), "random"}


@pytest.mark.parametrize("identifier", ["ViT-B-32/openai", "RN50/yfcc15m", "ViT-H-14-378/dfn5b"])
def test_load_backbone__quickgelu_weights_in_a_tower_without_it(identifier: str) -> None:
    name, tag = identifier.split("/")
    expected = rf"trained with QuickGELU.*'{name}' is built without it.* Use {name}-quickgelu/{tag}\."
    with pytest.raises(BackboneError, match=expected):
        load_backbone(identifier)


def test_load_backbone__a_quickgelu_tower_with_weights_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": "somewhere/"})
    expected = r"trained without QuickGELU.*'ViT-B-32-quickgelu' is built with it.* Use ViT-B-32/openai\."
    with pytest.raises(BackboneError, match=expected):
        load_backbone("ViT-B-32-quickgelu/openai")


@pytest.mark.parametrize("pair", mismatched_pairs(), ids="/".join)
def test_load_backbone__the_pair_advised_is_one_that_passes(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("stop here")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(BackboneError, match="QuickGELU") as caught:
        load_backbone("/".join(pair))
    advised = str(caught.value).rpartition("Use ")[2].removesuffix(".")
    if pair == ("roberta-ViT-B-32", "laion2b_s12b_b32k"):  # there is no such tower without QuickGELU
        assert advised == "other weights"
        return
    with pytest.raises(BackboneError, match="stop here"):
        load_backbone(advised)


@pytest.mark.parametrize("reason", [OSError("no route"), RuntimeError("no\nroute"), ValueError(), KeyError("x" * 5000)])
def test_load_backbone__the_hub_is_not_within_reach(reason: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def fail(name: str, *, pretrained: str, **settings: Any) -> None:
        asked.append((name, pretrained))
        raise reason

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(BackboneError) as caught:
        load_backbone(DEFAULT_BACKBONE)
    message = str(caught.value)
    assert asked == [("ViT-B-32-quickgelu", "openai")]  # so the default passed every check
    assert DEFAULT_BACKBONE in message
    assert "--backbone local-dir:PATH" in message
    assert "finealign doctor" in message
    assert "\n" not in message
    assert len(message) < 1000


def test_load_backbone__offline_in_earnest(tmp_path: Path) -> None:
    """No monkeypatch: whatever open_clip and the hub's client raise must end as one BackboneError."""
    code = """
from finealign.backbone import load_backbone
from finealign.errors import BackboneError
for identifier in ("ViT-B-32-quickgelu/openai", "hf-hub:timm/vit_base_patch32_clip_224.openai"):
    try:
        load_backbone(identifier)
    except BackboneError as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert "The weights of ViT-B-32-quickgelu/openai cannot be had" in first
    assert "The weights of hf-hub:timm/vit_base_patch32_clip_224.openai cannot be had" in second
    assert "local-dir:PATH" in first and "local-dir:PATH" in second


@pytest.mark.parametrize("there", [True, False])
def test_load_backbone__a_local_folder_without_a_configuration(there: bool, tmp_path: Path) -> None:
    folder = tmp_path if there else tmp_path / "missing"
    with pytest.raises(BackboneError, match=r"No open_clip model in .*open_clip_config.json is not there"):
        load_backbone(f"local-dir:{folder}")


@pytest.mark.parametrize("damage", ["torn", "shape", "lacking", "missing", "empty", "configuration", "section"])
def test_load_backbone__a_damaged_local_folder(damage: str, tmp_path: Path, tiny_backbone: Tiny) -> None:
    folder = copy_of(tiny_backbone("transformer"), tmp_path / "copy")
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    tensors = load_file(weights)
    if damage == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "shape":
        save_file(tensors | {"visual.proj": torch.zeros(64, 16)}, weights)
    elif damage == "lacking":
        save_file({name: value for name, value in tensors.items() if name != "visual.proj"}, weights)
    elif damage == "missing":
        weights.unlink()
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "configuration":
        config.write_text("{", encoding="utf-8")
    else:
        config.write_text("{}", encoding="utf-8")
    with pytest.raises(BackboneError, match=r"does not load: .*whose open_clip_model.safetensors fits") as caught:
        load_backbone(f"local-dir:{folder}")
    assert "\n" not in str(caught.value)


def test_load_backbone__random_is_seeded(architecture: str) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, again, other = (load_backbone(f"{architecture}/random", seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    torch.manual_seed(12)
    elsewhere = load_backbone(f"{architecture}/random", seed=3).model.state_dict()
    assert torch.equal(first["visual.proj"], elsewhere["visual.proj"])


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", TOWERS)
def test_encode_images__rows_have_length_one(tiny_backbone: Tiny, tower: str) -> None:
    features = load_backbone(tiny_backbone(tower)).encode_images(pictures(5))
    assert features.shape == (5, 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    assert features.std(0).min() > 0  # they differ from each other


def test_encode_images__bf16_comes_out_as_float32_of_length_one(tiny_backbone: Tiny) -> None:
    exact, rough = (
        load_backbone(tiny_backbone("transformer"), precision=precision).embed(pictures(5))
        for precision in ("fp32", "bf16")
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.norm(dim=1), torch.ones(5))
    assert 1e-6 < (rough - exact).abs().max() < 0.05


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_embed__any_chunking_equals_one_piece(
    tiny_backbone: Tiny, tower: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(tiny_backbone(tower))
    images = pictures(70)
    whole = backbone.encode_images(images)
    monkeypatch.setattr("finealign.backbone.tower_backbone.IMAGE_CHUNK", chunk)
    torch.testing.assert_close(backbone.embed(images), whole, rtol=0, atol=1e-6)


def test_encode_images__leaves_its_argument_alone(tiny_backbone: Tiny) -> None:
    images = pictures(3)
    load_backbone(tiny_backbone("transformer")).encode_images(images)
    assert torch.equal(images, pictures(3))


@pytest.mark.parametrize("size", [(47, 61), (61, 47), (32, 32), (20, 90)])
@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_encode_images__pixels_are_open_clips_own(
    tiny_backbone: Tiny, tmp_path: Path, preprocessing: str, size: tuple[int, int]
) -> None:
    folder = copy_of(tiny_backbone("transformer"), tmp_path / "copy", **PREPROCESSING[preprocessing])
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    expected = preprocess(picture(*size))[None]
    backbone = load_backbone(f"local-dir:{folder}")
    seen: list[Tensor] = []
    encode = backbone.model.encode_image

    def watched(pixels: Tensor) -> Any:
        seen.append(pixels)
        return encode(pixels)

    backbone.model.encode_image = watched
    moved = torch.from_numpy(np.array(backbone.geometry(picture(*size)))).permute(2, 0, 1)[None]
    assert moved.dtype == torch.uint8
    features = backbone.encode_images(moved)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        wanted = normalize(model.eval().encode_image(expected), dim=-1)
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_encode_images__gradient_reaches_the_norms_alone(tiny_backbone: Tiny, tower: str) -> None:
    backbone = load_backbone(tiny_backbone(tower))
    assert not backbone.encode_images(pictures(4)).requires_grad  # nothing learns until it is asked to
    norms = backbone.norm_parameters()
    for parameter in norms.values():
        parameter.requires_grad_(True)
    features = backbone.encode_images(pictures(4))
    torch.autograd.backward((features * torch.randn(features.shape, generator=torch.manual_seed(0))).sum())
    reached = {name for name, parameter in backbone.model.named_parameters() if parameter.grad is not None}
    assert reached == {f"visual.{name}" for name in norms}
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in norms.values())
    assert not backbone.embed(pictures(4)).requires_grad


def learning(backbone: OpenClipBackbone) -> OpenClipBackbone:
    for parameter in backbone.norm_parameters().values():
        parameter.requires_grad_(True)
    return backbone


def gradients(backbone: OpenClipBackbone, features: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward((features * weights).sum())
    return {
        name: parameter.grad for name, parameter in backbone.norm_parameters().items() if parameter.grad is not None
    }


def room_for(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the gradient of one image takes 100 bytes, and this many fit."""
    monkeypatch.setattr(room, "_bytes_kept", lambda encode, *, beside: 100)
    monkeypatch.setattr(room, "_memory", lambda device: 1000 * images + 999)
    monkeypatch.setattr(room, "ACTIVATION_SHARE", 0.1)


def watch_encoding(backbone: OpenClipBackbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each call that runs the tower, from now on."""
    seen: list[int] = []
    encode = backbone._encode

    def watched(images: Tensor, seen_by: Gaze | None = None) -> Tensor:
        seen.append(len(images))
        return encode(images, seen_by)

    monkeypatch.setattr(backbone, "_encode", watched)
    return seen


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("fitting", "sizes"),
    [(0, [1] * 7), (1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (6, [6, 1]), (7, [7]), (8, [7]), (10**9, [7])],
)
def test_encode_images__in_chunks_gives_the_same_gradients(
    tiny_backbone: Tiny, tower: str, fitting: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_memory", lambda device: 10**15)
    whole = learning(load_backbone(tiny_backbone(tower)))
    features = whole.encode_images(pictures(7))
    wanted = gradients(whole, features)

    room_for(fitting, monkeypatch)
    backbone = learning(load_backbone(tiny_backbone(tower)))
    seen = watch_encoding(backbone, monkeypatch)
    found = backbone.encode_images(pictures(7))
    assert seen == sizes
    torch.testing.assert_close(found, features, rtol=0, atol=1e-6)
    parts = gradients(backbone, found)
    again = sorted(sizes) if len(sizes) > 1 else []  # once more in the backward pass, in whatever order
    assert sorted(seen[len(sizes) :]) == again
    assert parts.keys() == wanted.keys() == backbone.norm_parameters().keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("tower", TOWERS)
def test_encode_images__in_chunks_in_bf16(tiny_backbone: Tiny, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fitting in (2, 100):
        room_for(fitting, monkeypatch)
        backbone = learning(load_backbone(tiny_backbone(tower), precision="bf16"))
        features = backbone.encode_images(pictures(7))
        found.append((features.detach(), torch.cat(list(gradients(backbone, features).values()))))
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=0.02 * float(whole.abs().max()))


@pytest.mark.parametrize("why", ["nothing learns", "no_grad", "inference_mode", "embed"])
def test_encode_images__without_gradient_is_in_one_piece(
    tiny_backbone: Tiny, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(2, monkeypatch)
    backbone = load_backbone(tiny_backbone("transformer"))
    if why != "nothing learns":
        learning(backbone)
    seen = watch_encoding(backbone, monkeypatch)
    modes = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
    with modes.get(why, nullcontext()):
        features = backbone.embed(pictures(7)) if why == "embed" else backbone.encode_images(pictures(7))
    assert not features.requires_grad
    assert seen == [7]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encode_images__splits_by_what_one_image_was_measured_to_take(
    tiny_backbone: Tiny, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = learning(load_backbone(tiny_backbone("transformer"), precision=precision))
    weights = backbone._encoder(backbone._working_type).visual.parameters()
    one = room._bytes_kept(lambda: backbone._encode(pictures(1)), beside=weights)
    monkeypatch.setattr(room, "_memory", lambda device: int(3.5 * one / room.ACTIVATION_SHARE))
    seen = watch_encoding(backbone, monkeypatch)
    for count, sizes in ((7, [3, 3, 1]), (2, [2]), (4, [3, 1])):
        backbone.encode_images(pictures(count))
        assert seen == ([1, *sizes] if count == 7 else sizes)  # measured once
        seen.clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_bytes_kept__grow_with_the_images_and_hold_no_weights(tiny_backbone: Tiny, tower: str, precision: Any) -> None:
    backbone = learning(load_backbone(tiny_backbone(tower), precision=precision))
    visual = backbone._encoder(backbone._working_type).visual

    def kept(images: Tensor) -> int:
        return room._bytes_kept(lambda: backbone._encode(images), beside=visual.parameters())

    one, two, four, sixteen = (kept(pictures(count)) for count in (1, 2, 4, 16))
    each = (sixteen - four) / 12
    assert each > 32 * 32 * 3  # more than the pixels
    constant = four - 4 * each
    weights = sum(parameter.nbytes for parameter in visual.parameters() if parameter.ndim > 1)
    assert abs(constant) < 0.05 * weights
    assert two - one == pytest.approx(each, rel=0.1)


def test_bytes_kept__of_a_known_computation() -> None:
    weight = torch.ones(3, 5, requires_grad=True)
    given = torch.ones(4, 3)

    def encode() -> Tensor:
        hidden = given @ weight  # keeps ``given``; and were a gradient wanted for that, the weight
        return hidden.exp().sin() * 2.0  # keep the result of exp, which is what sin is given

    assert room._bytes_kept(encode, beside=[weight]) == 4 * (4 * 3 + 4 * 5)
    assert room._bytes_kept(lambda: given.requires_grad_() @ weight, beside=[weight]) == 4 * (4 * 3)
    assert room._bytes_kept(lambda: given @ weight, beside=[]) == 4 * (4 * 3 + 3 * 5)
    with torch.no_grad():
        assert room._bytes_kept(encode, beside=[weight]) == 0


# --- gaze -------------------------------------------------------------------------------------------------------------


def some_prompts(count: int = 3, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def normalised_pixels(images: Tensor) -> Tensor:
    """As the tiny backbones are fed."""
    return (images.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("gaze", [Gaze(), Gaze(prompts=torch.empty(0, 64))], ids=["nothing", "no prompts"])
def test_gaze__at_nothing_in_particular_sees_what_the_tower_sees(tiny_backbone: Tiny, gaze: Gaze) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    found = backbone.embed(pictures(4), gaze)
    torch.testing.assert_close(found, backbone.embed(pictures(4)), rtol=0, atol=1e-6)


def test_gaze__prompts_stand_behind_the_tokens(tiny_backbone: Tiny) -> None:
    backbone, prompts = load_backbone(tiny_backbone("transformer")), some_prompts()
    visual = load_backbone(tiny_backbone("transformer")).model.visual
    with torch.no_grad():
        tokens = visual._embeds(normalised_pixels(pictures(4)))
        seen = visual.transformer(torch.cat([tokens, prompts.expand(4, -1, -1)], dim=1))
        wanted = normalize(visual.ln_post(seen[:, 0]) @ visual.proj, dim=-1)
    found = backbone.embed(pictures(4), Gaze(prompts))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (found - backbone.embed(pictures(4))).abs().max() > 1e-3
    torch.testing.assert_close(backbone.embed(pictures(4), Gaze(prompts.flip(0))), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompted", [False, True])
def test_gaze__salient_is_half_the_whole_and_half_the_salient_patches(tiny_backbone: Tiny, prompted: bool) -> None:
    backbone, prompts = load_backbone(tiny_backbone("transformer")), some_prompts() if prompted else None
    visual = load_backbone(tiny_backbone("transformer")).model.visual
    with torch.no_grad():
        tokens = visual._embeds(normalised_pixels(pictures(4)))
        behind = tokens[:, :0] if prompts is None else prompts.expand(4, -1, -1)
        seen = visual.ln_post(visual.transformer(torch.cat([tokens, behind], dim=1))) @ visual.proj
        whole = normalize(seen[:, 0], dim=-1)
        salient = saliency_pooled(seen[:, 1 : tokens.shape[1]], scale=backbone.logit_scale)
    found = backbone.embed(pictures(4), Gaze(prompts, salient=True))
    torch.testing.assert_close(found, normalize((whole + salient) / 2, dim=-1), rtol=0, atol=1e-5)
    assert (found - whole).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("salient", [False, True])
def test_gaze__gradient_reaches_the_prompts_and_the_norms_alone(
    tiny_backbone: Tiny, salient: bool, precision: Any
) -> None:
    backbone = learning(load_backbone(tiny_backbone("transformer"), precision=precision))
    prompts = some_prompts().requires_grad_()
    features = backbone.encode_images(pictures(4), Gaze(prompts, salient))
    assert features.dtype == torch.float32
    assert len(gradients(backbone, features)) == len(TRANSFORMER_NORMS)
    assert prompts.grad is not None
    assert bool(prompts.grad.any(dim=1).all())
    reached = {name for name, parameter in backbone.model.named_parameters() if parameter.grad is not None}
    assert reached == {f"visual.{name}" for name in TRANSFORMER_NORMS}


def test_gaze__in_chunks_gives_the_same_gradients(tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fitting in (2, 100):
        room_for(fitting, monkeypatch)
        backbone, prompts = learning(load_backbone(tiny_backbone("transformer"))), some_prompts().requires_grad_()
        seen = watch_encoding(backbone, monkeypatch)
        gradients(backbone, backbone.encode_images(pictures(5), Gaze(prompts)))
        assert seen[0] == min(fitting, 5)
        assert prompts.grad is not None
        found.append(prompts.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * float(found[1].abs().max()))


@pytest.mark.parametrize("gaze", [Gaze(some_prompts()), Gaze(salient=True)], ids=["prompts", "salient"])
def test_gaze__leaves_nothing_behind(tiny_backbone: Tiny, gaze: Gaze) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    before = backbone.embed(pictures(3))
    backbone.embed(pictures(3), gaze)
    assert torch.equal(backbone.embed(pictures(3)), before)


def test_gaze__a_convolutional_tower_looks_as_it_always_does(tiny_backbone: Tiny) -> None:
    backbone = load_backbone(tiny_backbone("convolutional"))
    assert backbone.token_width == 0
    found = backbone.embed(pictures(3), Gaze(some_prompts(), salient=True))
    assert torch.equal(found, backbone.embed(pictures(3)))


# --- what may be trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "kind", "other"), [("transformer", nn.LayerNorm, "ln_final"), ("convolutional", nn.BatchNorm2d, "bn")]
)
def test_norm_parameters__are_scale_and_shift_of_the_image_tower(
    tiny_backbone: Tiny, tower: str, kind: type[nn.Module], other: str
) -> None:
    backbone = load_backbone(tiny_backbone(tower))
    expected = {
        f"{name}.{part}"
        for name, module in backbone.model.visual.named_modules()
        if isinstance(module, kind)
        for part in ("weight", "bias")
    }
    found = backbone.norm_parameters()
    assert set(found) == expected
    assert len(expected) >= 10
    own = dict(backbone.model.visual.named_parameters())
    assert all(found[name] is own[name] for name in found)
    if tower == "transformer":
        assert set(found) == TRANSFORMER_NORMS
    assert not any(parameter is value for value in found.values() for parameter in backbone.model.ln_final.parameters())


def test_norm_parameters__a_tower_without_any(tiny_backbone: Tiny) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    backbone.model.visual = nn.Linear(3, 3)
    with pytest.raises(BackboneError, match=r"no normalisation layer.*training.learn=anchors"):
        backbone.norm_parameters()


@pytest.mark.parametrize("tower", TOWERS)
def test_load_backbone__is_in_evaluation_mode(tiny_backbone: Tiny, tower: str) -> None:
    backbone = load_backbone(tiny_backbone(tower))
    assert not any(module.training for module in backbone.model.modules())
    before = {name: value.clone() for name, value in backbone.model.named_buffers()}
    backbone.encode_images(pictures(8))
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.named_buffers())


@pytest.mark.parametrize(("tower", "expected"), [("transformer", False), ("convolutional", True)])
def test_convolutional__is_told_by_batchnorm(tiny_backbone: Tiny, tower: str, expected: bool) -> None:
    assert load_backbone(tiny_backbone(tower)).convolutional is expected


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_lend__puts_back_what_was_there(tiny_backbone: Tiny, tower: str, fails: bool) -> None:
    backbone = load_backbone(tiny_backbone(tower))
    start = {name: value.detach().clone() for name, value in backbone.norm_parameters().items()}
    usual = backbone.embed(pictures(4))
    others = {name: value * 1.5 + 0.1 for name, value in start.items()}

    def look() -> Tensor:
        with backbone.lend(others):
            assert all(torch.equal(value, others[name]) for name, value in backbone.norm_parameters().items())
            seen = backbone.embed(pictures(4))
            if fails:
                raise ZeroDivisionError
            return seen

    if fails:
        with pytest.raises(ZeroDivisionError):
            look()
    else:
        assert not torch.allclose(look(), usual, atol=1e-3)
    assert all(torch.equal(value, start[name]) for name, value in backbone.norm_parameters().items())
    assert torch.equal(backbone.embed(pictures(4)), usual)


# --- saving -----------------------------------------------------------------------------------------------------------


def altered(backbone: OpenClipBackbone) -> OpenClipBackbone:
    """As training leaves it: other normalisation parameters than it was loaded with."""
    backbone.load_norms({name: value * 1.2 + 0.05 for name, value in backbone.norm_parameters().items()})
    return backbone


def assert_opens_in_open_clip(backbone: OpenClipBackbone, folder: Path) -> None:
    backbone.save(folder)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red thing", "a blue thing"])
    model.eval()
    with torch.no_grad():
        image = normalize(model.encode_image(preprocess(picture())[None]), dim=-1)
        words = normalize(model.encode_text(tokens), dim=-1)
    moved = torch.from_numpy(np.array(backbone.geometry(picture()))).permute(2, 0, 1)[None]
    torch.testing.assert_close(image, backbone.embed(moved), rtol=0, atol=1e-5)
    ours = backbone.encode_texts(texts(("a red thing",), ("a blue thing",)))
    torch.testing.assert_close(words, ours.descriptions, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_save__open_clip_opens_it(tiny_backbone: Tiny, tmp_path: Path, tower: str) -> None:
    folder = copy_of(tiny_backbone(tower), tmp_path / "copy", **PREPROCESSING["clip"])
    backbone = altered(load_backbone(f"local-dir:{folder}"))
    assert_opens_in_open_clip(backbone, tmp_path / "saved")
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(again.embed(pictures(4)), backbone.embed(pictures(4)))
    assert again.preprocess == backbone.preprocess
    assert not list((tmp_path / "saved").glob("*.part"))


def test_save__open_clip_opens_a_named_architecture(architecture: str, tmp_path: Path) -> None:
    """The configuration comes from the registry then, QuickGELU included."""
    assert_opens_in_open_clip(altered(load_backbone(f"{architecture}/random")), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "open_clip_config.json").read_text(encoding="utf-8"))
    assert saved["model_cfg"]["quick_gelu"] is True


@pytest.mark.parametrize("tower", TOWERS)
def test_save__trained_in_bf16_differs_in_the_norms_alone(tiny_backbone: Tiny, tmp_path: Path, tower: str) -> None:
    backbone = learning(load_backbone(tiny_backbone(tower), precision="bf16"))
    optimizer = torch.optim.SGD(backbone.norm_parameters().values(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        gradients(backbone, backbone.encode_images(pictures(4, seed=seed)))
        optimizer.step()
    backbone.save(tmp_path / "saved")
    before = load_file(Path(tiny_backbone(tower).removeprefix("local-dir:")) / "open_clip_model.safetensors")
    after = load_file(tmp_path / "saved" / "open_clip_model.safetensors")
    assert after.keys() == before.keys()
    assert all(value.dtype == before[name].dtype for name, value in after.items())
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"visual.{name}" for name in backbone.norm_parameters()}
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}", precision="bf16")
    assert torch.equal(again.embed(pictures(4)), backbone.embed(pictures(4)))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_encode_texts__names_are_the_mean_over_templates(tiny_backbone: Tiny) -> None:
    identifier = tiny_backbone("transformer")
    model, tokenizer = open_clip.create_model(identifier).eval(), open_clip.get_tokenizer(identifier)
    templates = ("a photo of a {}.", "{} up close", "one {}")
    found = load_backbone(identifier).encode_texts(
        texts(("dark red", "like blood"), ("leafy",), ("the sky", "the sea", "a jay"), templates=templates)
    )

    def encode(sentences: list[str]) -> Tensor:
        with torch.no_grad():
            return normalize(model.encode_text(tokenizer(sentences)), dim=-1)

    for row, name in zip(found.names, CLASSES, strict=True):
        filled = encode([f"a photo of a {name}.", f"{name} up close", f"one {name}"])
        torch.testing.assert_close(row, normalize(filled.mean(0), dim=-1), rtol=0, atol=1e-6)
    sentences = encode(["dark red", "like blood", "leafy", "the sky", "the sea", "a jay"])
    torch.testing.assert_close(found.descriptions, sentences, rtol=0, atol=1e-6)
    assert found.class_of.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.num_classes == 3


def test_encode_texts__any_chunking_equals_one_piece(tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    given = texts(("dark red", "like blood"), ("leafy",), templates=("a {}.", "the {}"))
    whole = load_backbone(tiny_backbone("transformer")).encode_texts(given)
    monkeypatch.setattr(room, "TEXT_CHUNK", 2)
    parts = load_backbone(tiny_backbone("transformer")).encode_texts(given)  # another: one encodes the same texts once
    torch.testing.assert_close(parts.names, whole.names, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.descriptions, whole.descriptions, rtol=0, atol=1e-6)


def test_encode_texts__what_was_refused_is_refused_again(tiny_backbone: Tiny) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    for _ in range(2):
        with pytest.raises(BackboneError, match="1 texts are longer"):
            backbone.encode_texts(texts(("a " * 80,), ("a dog",)))


def test_encode_texts__exactly_the_window_is_accepted(tiny_backbone: Tiny) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    full = "a " * 74 + "cat"
    tokens = open_clip.get_tokenizer("ViT-B-32")([full, full + "s and dogs"], context_length=100)
    assert (tokens != 0).sum(1).tolist() == [77, 79]  # with the start and the end, so the first just fits
    assert backbone.encode_texts(texts((full,), ("a dog",))).descriptions.shape == (2, 32)


# "!$" is cut in two, and "!" before another sign is token 0, which is also what the padding is made of.
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a " * 75 + "cat", id="one word too many"),
        pytest.param("a " * 300, id="many windows"),
        pytest.param("a " * 76 + "!$", id="the padding's own token right after the window"),
    ],
)
def test_encode_texts__beyond_the_window_is_refused(tiny_backbone: Tiny, text: str) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    with pytest.raises(BackboneError, match=r"1 texts are longer than the 77 tokens.*The first: 'a a a.*Shorten"):
        backbone.encode_texts(texts((text,), ("a dog",)))


def test_encode_texts__a_template_can_push_a_name_beyond_the_window(tiny_backbone: Tiny) -> None:
    backbone = load_backbone(tiny_backbone("transformer"))
    with pytest.raises(BackboneError, match=r"2 texts are longer"):
        backbone.encode_texts(texts(("x",), ("y",), templates=("a " * 75 + "{}", "a {}")))


# --- the list ---------------------------------------------------------------------------------------------------------


def test_list_backbones__holds_each_sound_pair_once() -> None:
    found = list_backbones()
    wrong = {"/".join(pair) for pair in mismatched_pairs()}
    assert DEFAULT_BACKBONE in found
    assert "ViT-B-32/openai" in wrong
    assert set(found) == {"/".join(pair) for pair in open_clip.list_pretrained()} - wrong
    assert found == sorted(set(found))


@pytest.mark.parametrize("shape", [(1, 100), (3, 101), (200, 4), (201, 5), (1, 5001), (33, 1), (32, 1)])
def test_geometry__of_a_strip_is_that_of_its_middle(tiny_backbone: Tiny, shape: tuple[int, int]) -> None:
    """A strip of 1 x 100,000 would be enlarged to gigabytes first. What differs is half a pixel's rounding."""
    geometry: Any = load_backbone(tiny_backbone("transformer")).geometry
    rows, columns, channels = np.indices((*shape, 3))
    strip = Image.fromarray((127 + 100 * np.sin(rows / 9 + columns / 9 + channels)).astype(np.uint8))
    assert geometry.keeps_centre
    middle = np.asarray(geometry(strip)).astype(int)
    geometry.keeps_centre = False
    whole = np.asarray(geometry(strip)).astype(int)
    assert whole.std() > 10
    assert np.abs(middle - whole).max() <= 3
