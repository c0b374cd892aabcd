"""Exports: opened by the libraries they are for, in processes that never import FineAlign, and scoring as it does."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import CLASSES, HANG, open_clip_backbone, tiny_config, write_photos
from deep_images import SHARED, tiff_of, wide_png
from finealign import FineAlign
from finealign.backbone.clip_names import clip_weights
from finealign.errors import ConfigError, FinealignError, ModelError, OutputError
from finealign.export.checks import Checked, Exported, Format, Measure
from finealign.export.hub import push
from finealign.export.run import export

Tiny = Callable[[str], str]
Make = Callable[..., Exported]
DESCRIPTIONS = {name: [f"a {name} thing", f"some {name} paint"] for name in CLASSES}


def run(folder: Path, code: str, *words: str) -> Any:
    """What ``code`` prints as JSON, beside an export, in a process that ends without FineAlign."""
    end = "\nassert not [name for name in sys.modules if name.startswith('finealign')]\n"
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"import json, sys\n{code}{end}", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def unlearned(backbone: str, **settings: Any) -> FineAlign:
    return FineAlign(CLASSES, descriptions=DESCRIPTIONS, config=tiny_config(backbone, **settings)).unlearned()


@pytest.fixture(scope="session")
def some_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("export") / "photos", each=3)


@pytest.fixture(scope="session")
def adapted(tiny_backbone: Tiny, some_photos: Path) -> FineAlign:
    """A model whose anchors and normalisation have learned."""
    settings = {"training__epochs": 1, "method__anchors_per_class": 2, "prediction__calibrate": True}
    config = tiny_config(tiny_backbone("transformer"), **settings)
    return FineAlign(CLASSES, descriptions=DESCRIPTIONS, config=config).fit(some_photos)


@pytest.fixture(scope="session")
def exported(adapted: FineAlign, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The adapted model in a format, made once: in place of an earlier export, in an empty folder, or in a new one."""
    made: dict[str, Exported] = {}

    def make(kind: Any) -> Exported:
        if kind not in made:
            home = tmp_path_factory.mktemp(f"exports-{kind}")
            if kind == "open_clip":
                write_earlier(home / "out")
            elif kind == "hf":
                (home / "out").mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(home)
                told = export(adapted, Path("out"), format=kind, overwrite=kind == "open_clip")
            made[kind] = replace(told, folder=home / told.folder)
        return made[kind]

    return make


def write_earlier(folder: Path) -> None:
    """What an export of before leaves, once its usage.py was imported."""
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"of before")
    (folder / "parity.json").write_text(json.dumps({"files": ["parity.json", "model.onnx"]}))


def paths_in(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.png"))]


# --- open_clip --------------------------------------------------------------------------------------------------------


def test_open_clip__alone_scores_and_encodes_texts_as_finealign(
    adapted: FineAlign, exported: Make, some_photos: Path
) -> None:
    found = exported("open_clip")
    code = """
import usage
scores, probabilities = usage.classify(sys.argv[1:])
with usage.torch.no_grad():
    text = usage.model.encode_text(usage.tokenizer(["a photo of a red bird"]), normalize=True)
print(json.dumps([usage.about["classes"], probabilities.tolist(), text.tolist()]))
"""
    paths = paths_in(some_photos)
    classes, probabilities, text = run(found.folder, code, *paths)
    assert classes == CLASSES
    assert np.abs(np.array(probabilities) - adapted.predict_proba(paths, score="global")).max() < 1e-5
    own = adapted.backbone_.encode_sentences(["a photo of a red bird"])
    assert np.abs(np.array(text) - own.numpy()).max() < 1e-6


def test_open_clip__files_and_figures_are_told(exported: Make) -> None:
    found = exported("open_clip")
    assert set(found.files) == {path.name for path in found.folder.iterdir()}
    assert load_file(found.folder / "anchors.safetensors")["anchors"].shape == (3, 2, 32)
    about = json.loads((found.folder / "parity.json").read_text())
    told = found.as_json()
    assert told["bytes"] == sum(path.stat().st_size for path in found.folder.iterdir())
    assert about["parity"] == told["parity"]
    assert about["parity"].keys() == {"scores", "text embeddings"}
    assert all(0 <= one["largest"] <= one["promised"] for one in about["parity"].values())


@pytest.mark.nightly
def test_open_clip__a_timm_tower_in_bf16_is_exported_in_float32(tiny_backbone: Tiny, tmp_path: Path) -> None:
    model = unlearned(tiny_backbone("convolutional"), precision="bf16")
    found = export(model, tmp_path / "out", format="open_clip")
    assert found.parity["scores"].largest < 1e-6
    weights = load_file(found.folder / "open_clip_model.safetensors")
    assert torch.equal(weights["visual.head.proj.weight"], open_clip_backbone(model).model.visual.head.proj.weight)


# --- transformers -----------------------------------------------------------------------------------------------------


def test_hf__transformers_alone_has_open_clips_logits(adapted: FineAlign, exported: Make, some_photos: Path) -> None:
    found = exported("hf")
    code = """
import torch, usage
from transformers import pipeline
paths = sys.argv[1:]
labels = ["red", "green", "a blue bird"]
sentences = [f"This is a photo of {label}." for label in labels]
texts = usage.processor.tokenizer(sentences, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = usage.model(**texts, pixel_values=usage.prepare(paths)).logits_per_image
asked = pipeline("zero-shot-image-classification", model=str(usage.HERE))
answers = [{one["label"]: one["score"] for one in row} for row in asked(paths, candidate_labels=labels)]
print(json.dumps([logits.tolist(), [[row[label] for label in labels] for row in answers],
                  usage.classify(paths)[1].tolist(), usage.model.config.text_config.eos_token_id]))
"""
    side = adapted.backbone_.input_size

    def alike(path: str) -> bool:  # where transformers cuts the centre that open_clip cuts
        with Image.open(path) as image:
            return (int(side * max(image.size) / min(image.size)) - side) % 4 != 3

    paths = [path for path in paths_in(some_photos) if alike(path)]
    assert len(paths) >= 4
    logits, answers, probabilities, eos = run(found.folder, code, *paths)
    backbone = adapted.backbone_
    texts = backbone.encode_sentences([f"This is a photo of {label}." for label in ("red", "green", "a blue bird")])
    whole = adapted.features([Path(path) for path in paths], crops=False)[0].weak
    wanted = backbone.logit_scale * whole @ texts.T
    assert np.abs(np.array(logits) - wanted.numpy()).max() < 1e-4
    assert np.abs(np.array(answers) - wanted.softmax(1).numpy()).max() < 5e-3  # torchvision rounds pixels otherwise
    assert np.abs(np.array(probabilities) - adapted.predict_proba(paths, score="global")).max() < 1e-5
    assert eos == 49407


def test_hf__parity_names_logits_and_pixels(exported: Make) -> None:
    found = exported("hf")
    assert found.parity.keys() == {"logits", "scores", "pixels by pillow", "pixels by torchvision"}
    assert found.parity["logits"].promised == 1e-4
    assert found.parity["pixels by pillow"].largest < 1e-6
    assert "one pixel beside" in found.notes[0]


@pytest.mark.nightly
def test_hf__quick_gelu_and_eos_pooling_are_clips_too(tiny_backbone: Tiny, tmp_path: Path) -> None:
    change = {"quick_gelu": True, "text_cfg": {"pool_type": "eos", "eos_id": 49407}}
    backbone = rebuilt(tiny_backbone, tmp_path, change, {"resize_mode": "squash", "interpolation": "bilinear"})
    found = export(unlearned(backbone), tmp_path / "out", format="hf")
    assert found.parity["logits"].largest < 1e-5
    assert json.loads((found.folder / "config.json").read_text())["text_config"]["hidden_act"] == "quick_gelu"


def rebuilt(tiny_backbone: Tiny, tmp_path: Path, change: dict[str, Any], preprocess: dict[str, Any]) -> str:
    """The tiny transformer with other settings and weights drawn for them."""
    from open_clip.model import CLIP, CustomTextCLIP

    settings = json.loads(
        (Path(tiny_backbone("transformer").removeprefix("local-dir:")) / "open_clip_config.json").read_text()
    )
    config = settings["model_cfg"]
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    kind = CustomTextCLIP if config.get("custom_text") else CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(**{name: value for name, value in config.items() if name != "custom_text"})
    folder = tmp_path / "rebuilt"
    folder.mkdir()
    settings["preprocess_cfg"] |= preprocess
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(
        {name: value.clone().contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}}, "attentional_pool"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pools by 'avg'"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"vision_cfg": {"pos_embed_type": "sin_cos_2d"}}, "pos_embed_type"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "ls_init_value"),
        ({"vision_cfg": {"qk_norm": True}}, "custom ones"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "different activations"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"pool_type": "last"}}, "pools by 'last'"),
        ({"text_cfg": {"proj_bias": True}}, "proj_bias"),
        ({"init_logit_bias": -10.0}, "init_logit_bias"),
        ({"custom_text": True}, "CustomTextCLIP"),
    ],
)
def test_hf__what_is_no_clip_is_refused_by_name(
    change: dict[str, Any], named: str, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    model = unlearned(rebuilt(tiny_backbone, tmp_path, change, {}))
    with pytest.raises(ConfigError, match=named) as caught:
        export(model, tmp_path / "out", format="hf")
    assert "--format open_clip" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_hf__timm_towers_and_padded_images_are_refused(tiny_backbone: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its image tower is test_resnet"):
        export(unlearned(tiny_backbone("convolutional")), tmp_path / "out", format="hf")
    padded = unlearned(rebuilt(tiny_backbone, tmp_path, {}, {"resize_mode": "longest"}))
    with pytest.raises(ConfigError, match="resize_mode longest"):
        export(padded, tmp_path / "out", format="hf")


def test_hf__a_name_that_is_tokenised_otherwise_is_refused(tiny_backbone: Tiny, tmp_path: Path) -> None:
    config = tiny_config(tiny_backbone("transformer"))
    model = FineAlign(["Cooper’s hawk", "wren"], config=config).unlearned()
    with pytest.raises(ModelError, match="Cooper’s hawk"):
        export(model, tmp_path / "out", format="hf")
    assert list(tmp_path.iterdir()) == []


def test_clip_weights__a_weight_without_a_place_is_named() -> None:
    with pytest.raises(ModelError, match=r"'visual\.other'"):
        clip_weights({"visual.other": torch.zeros(1)})


# --- ONNX -------------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "open_clip", "finealign"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import usage
scores, probabilities = usage.classify(sys.argv[1:])
print(json.dumps([usage.CLASSES, probabilities.tolist()]))
"""


def without_torch(model: FineAlign, found: Exported, photos: Path) -> float:
    """How far usage.py is from FineAlign on photos of several sizes; the labels have to be the same."""
    paths = paths_in(photos)
    classes, probabilities = run(found.folder, WITHOUT_TORCH, *paths)
    own = model.predict_proba(paths, score=found.score)
    assert classes == CLASSES
    assert np.array_equal(np.argmax(probabilities, axis=1), own.argmax(1))
    return float(np.abs(np.array(probabilities) - own).max())


def test_onnx__without_torch_crops_are_scored_as_by_finealign(
    adapted: FineAlign, exported: Make, some_photos: Path
) -> None:
    import onnx

    found = exported("onnx")
    assert found.score == adapted.score_ != "global"
    assert without_torch(adapted, found, some_photos) < 5e-3
    graph = onnx.load(found.folder / "model.onnx").graph
    shapes = {
        one.name: [side.dim_param or side.dim_value for side in one.type.tensor_type.shape.dim] for one in graph.input
    }
    assert shapes == {"image": ["batch", 3, 32, 32], "crops": ["batch", 2, 3, 32, 32]}
    assert [one.name for one in graph.output] == ["scores", "probabilities"]
    assert {one.type.tensor_type.elem_type for one in graph.input} == {onnx.TensorProto.UINT8}
    assert not [name for name in found.files if name.endswith(".data")]


def unusual_photos(folder: Path) -> Path:
    """Transparent ones and those of more than 8 bits a channel."""
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 0x1000, (60, 50, 3), dtype=np.uint16)
    values[:30] >>= 2
    (folder / "planar.tif").write_bytes(tiff_of(values, photometric=2, planar=True, deflated=True))
    (folder / "alpha.tif").write_bytes(tiff_of(values[..., :2], photometric=1, extra=[2]))
    (folder / "wide.png").write_bytes(wide_png(values))
    Image.fromarray(values[..., 0]).save(folder / "grey.png")
    see_through = Image.fromarray((values >> 4).astype(np.uint8))
    see_through.putalpha(Image.fromarray((values[..., 2] >> 4).astype(np.uint8)))
    see_through.save(folder / "transparent.png")
    return folder


def test_onnx__transparent_and_deep_images_are_read_as_by_finealign(
    adapted: FineAlign, exported: Make, tmp_path: Path
) -> None:
    paths = sorted(unusual_photos(tmp_path / "photos").iterdir())
    paths += [path for path in sorted(SHARED.glob("*")) if path.suffix in (".png", ".tif")]
    found = exported("onnx")
    _, probabilities = run(found.folder, WITHOUT_TORCH, *map(str, paths))
    own = adapted.predict_proba(paths, score=found.score)
    assert np.abs(np.array(probabilities) - own).max() < 0.01
    assert np.array_equal(np.argmax(probabilities, axis=1), own.argmax(1))


def test_onnx__heic_is_read_as_by_finealign(
    adapted: FineAlign, exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    heif.from_pillow(Image.fromarray(noise)).save(tmp_path / "a.heic", exif=exif.tobytes())
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 40))).save(tmp_path / "named.jpg")
    paths = [str(tmp_path / "a.heic"), str(tmp_path / "named.jpg")]
    found = exported("onnx")
    _, probabilities = run(found.folder, WITHOUT_TORCH, *paths)
    assert np.abs(np.array(probabilities) - adapted.predict_proba(paths, score=found.score)).max() < 0.01
    (tmp_path / "pillow_heif.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-B", "usage.py", paths[1]],
        cwd=found.folder,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"{paths[1]}: a HEIC image, for which a package is missing: pip install pillow-heif.\n"


def test_onnx__usage_prints_a_class_for_each_image(exported: Make, some_photos: Path) -> None:
    paths = paths_in(some_photos)[:2]
    done = subprocess.run(
        [sys.executable, "-B", "usage.py", *paths],
        cwd=exported("onnx").folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == paths
    assert all(line.partition(": ")[2].split()[0] in CLASSES for line in done.stdout.splitlines())


@pytest.mark.nightly
def test_onnx__a_convolutional_tower_with_wcas_way_to_weigh_crops(
    tiny_backbone: Tiny, some_photos: Path, tmp_path: Path
) -> None:
    model = unlearned(tiny_backbone("convolutional"), method__name="wca")
    found = export(model, tmp_path / "out", format="onnx")
    assert found.score == "las"
    assert without_torch(model, found, some_photos) < 5e-3
    assert max(found.parity[name].largest for name in ("scores", "probabilities")) < 1e-5


def test_onnx__padded_whole_images_are_one_input_and_weights_too_many_lie_beside(
    tiny_backbone: Tiny, some_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.setattr("finealign.export.onnx.ONE_FILE", 1000)
    settings = {"resize_mode": "longest", "interpolation": "bilinear", "fill_color": 90}
    model = unlearned(rebuilt(tiny_backbone, tmp_path, {}, settings))
    found = export(model, tmp_path / "out", format="onnx", score="global")
    graph = onnx.load(found.folder / "model.onnx", load_external_data=False).graph
    assert [one.name for one in graph.input] == ["image"]
    assert "model.onnx.data" in found.files
    assert "a file of their own" in found.notes[0]
    assert without_torch(model, found, some_photos) < 1e-5


@pytest.mark.nightly
def test_onnx__the_demos_model_by_the_crops_it_keeps_and_the_whole(some_photos: Path, tmp_path: Path) -> None:
    from finealign.demo.model import demo_model

    model = unlearned(demo_model(), method__crops_kept=1, prediction__score="fused", views__crops=3)
    found = export(model, tmp_path / "out", format="onnx")
    assert found.score == "fused"
    assert without_torch(model, found, some_photos) < 0.05


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("lafter", "prompts it has learned"),
        ("microclip", "salient patches"),
        ("stata", "all those it was fitted"),
        ("transclip", "all those it was fitted"),
    ],
)
def test_refused__methods_that_see_otherwise(method: str, why: str, tiny_backbone: Tiny, tmp_path: Path) -> None:
    model = unlearned(tiny_backbone("transformer"), method__name=method)
    formats: list[Format] = ["open_clip", "hf", "onnx"]
    for kind in formats:
        with pytest.raises(ConfigError, match=why):
            export(model, tmp_path / "out", format=kind)
    assert list(tmp_path.iterdir()) == []


def test_refused__scores_the_format_or_the_method_has_not(
    adapted: FineAlign, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="scores whole images"):
        export(adapted, tmp_path / "out", format="open_clip", score="las")
    wca = unlearned(tiny_backbone("transformer"), method__name="wca")
    with pytest.raises(ConfigError, match="more than anchors"):
        export(wca, tmp_path / "out", format="hf")
    with pytest.raises(ConfigError, match=r"no score 'global'\. Valid: las"):
        export(wca, tmp_path / "out", format="onnx", score="global")


def test_refused__a_model_that_is_not_fitted(tmp_path: Path) -> None:
    with pytest.raises(FinealignError, match="not fitted"):
        export(FineAlign(CLASSES), tmp_path / "out", format="onnx")


def test_refused__a_missing_library_names_the_extra(
    adapted: FineAlign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finealign.export.refusals.find_spec", lambda name: None)
    for kind, named in (("onnx", "onnx, onnxscript, onnxruntime"), ("hf", "transformers")):
        with pytest.raises(ConfigError, match=rf"{named}, which is not installed: pip install 'finealign\[export\]'"):
            export(adapted, tmp_path / "out", format=kind)  # type: ignore[arg-type]


def test_refused__what_differs_too_much_is_named_and_leaves_nothing(
    adapted: FineAlign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(saved: FineAlign, kind: str, folder: Path, aside: Path) -> Checked:
        (folder / "written").touch()
        return Checked({"scores": Measure(float("nan"), 1e-5), "texts": Measure(0.0, 1e-5)})

    monkeypatch.setattr("finealign.export.run.WRITERS", {"open_clip": differ})
    with pytest.raises(ModelError, match="differs from FineAlign in scores by nan, over 1e-05"):
        export(adapted, tmp_path / "out", format="open_clip")
    assert list(tmp_path.iterdir()) == []


def test_measure__no_number_and_more_than_promised_are_not_kept() -> None:
    assert Measure(1.0, 1.0).kept
    assert not Measure(1.1, 1.0).kept
    assert not Measure(float("nan"), 1.0).kept


# --- the folder -------------------------------------------------------------------------------------------------------


def test_folder__strangers_are_never_touched(adapted: FineAlign, exported: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"'mine\.txt', which is of no export"):
        export(adapted, tmp_path, format="onnx", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        export(adapted, tmp_path / "mine.txt", format="onnx", overwrite=True)
    before = exported("onnx").folder
    with pytest.raises(OutputError, match="--overwrite"):
        export(adapted, before, format="onnx")
    (before / "mine.txt").write_text("mine")
    try:
        with pytest.raises(OutputError, match="of no export"):
            export(adapted, before, format="onnx", overwrite=True)
    finally:
        (before / "mine.txt").unlink()


@pytest.mark.parametrize("kind", ["open_clip", "hf", "onnx"])
def test_folder__there_is_the_export_alone_whatever_was_there(kind: str, exported: Make) -> None:
    found = exported(kind)
    assert {path.name for path in found.folder.iterdir()} == set(found.files)
    assert [path.name for path in found.folder.parent.iterdir()] == ["out"]
    assert len({path.stat().st_mode & 0o777 for path in found.folder.iterdir() if path.is_file()}) == 1


# --- the card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "library", "task", "opened"),
    [
        ("open_clip", "open_clip", "zero-shot-image-classification", "open_clip.create_model_and_transforms"),
        ("hf", "transformers", "zero-shot-image-classification", "CLIPModel.from_pretrained"),
        ("onnx", "onnx", "image-classification", "`model.onnx`"),
    ],
)
def test_card__tells_the_hub_and_the_reader_how_the_export_is_used(
    kind: str, library: str, task: str, opened: str, adapted: FineAlign, exported: Make
) -> None:
    from huggingface_hub import ModelCard

    folder = exported(kind).folder
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == (library, task)
    use = card.text.partition("## Use")[2].partition("## ")[0]
    assert "python usage.py" in use
    assert opened in use
    assert "# 3 classes, by fair" in card.text
    assert "red, green, blue." in card.text
    assert "FineAlign.load" not in card.text
    origin = Path(adapted.model_.inference.backbone.removeprefix("local-dir:"))
    assert f"`local-dir:{origin.name}`" in card.text
    assert str(origin) not in card.text
    named = set(re.findall(r"`([\w.]+\.(?:json|safetensors|onnx|py))`", card.text))
    assert named <= {path.name for path in folder.iterdir()}


def test_card__a_saved_model_still_tells_of_finealign(adapted: FineAlign, tmp_path: Path) -> None:
    adapted.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "FineAlign.load" in card.partition("## Use")[2].partition("## Classes")[0]
    assert "usage.py" not in card


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("open_clip", marks=pytest.mark.nightly), "onnx"])
def test_export__of_the_start(adapted: FineAlign, some_photos: Path, tmp_path: Path, kind: Any) -> None:
    """As a model whose start is in use, and of one saved with the adapted model in use, where it is asked for."""
    adapted.save(tmp_path / "model")
    model = FineAlign.load(tmp_path / "model", use="start", device="cpu", precision="fp32")
    found = export(model, tmp_path / "out", format=kind)
    assert (found.use, found.as_json()["use"], found.score) == ("start", "start", "global")
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["use"] == "start"
    code = "import usage\nprint(json.dumps(usage.classify(sys.argv[1:])[1].tolist()))"
    paths = paths_in(some_photos)
    found_probabilities = run(found.folder, code, *paths)
    start = model.predict_proba(paths)
    assert np.abs(np.array(found_probabilities) - start).max() < 1e-3
    assert np.abs(adapted.predict_proba(paths, score="global") - start).max() > 0.01
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**In use**: the model before adaptation.\n" in card
    assert "--use" not in card


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What a hub has been sent: repositories by name, and whether each is private."""

    private: dict[str, bool]
    files: dict[str, bytes]
    tokens: set[str]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name.startswith("closed/"):
                self.reply({"error": "You have no right to write there"}, 403)
            elif name in self.server.private:
                self.reply({"error": "it is there", "url": f"{self.address}/{name}"}, 409)
            else:
                self.server.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
                self.reply({"url": f"{self.address}/{name}", "id": "1"})
        elif "/preupload/" in path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.reply({"files": files})
        elif "/commit/" in path:
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    self.server.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            made = {"commitOid": "1" * 40, "commitUrl": f"{self.address}/{name}/commit/{'1' * 40}"}
            self.reply({"success": True, **made})
        else:
            self.reply({"error": "what is that"}, 404)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/").partition("/revision")[0]
        if name in self.server.private:
            private = self.server.private[name]
            self.reply({"id": name, "private": private, "sha": "1" * 40, "siblings": []})
        else:
            self.reply({"error": "Repository not found"}, 404)

    def reply(self, found: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answer)
    server.private, server.files, server.tokens = {"birds/public": False}, {}, set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pushed(address: str, home: Path, calls: list[tuple[str, str, bool]]) -> list[str]:
    """What ``push`` says to each call, in a process whose hub is at this address."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_told", "NO_PROXY": "127.0.0.1"}
    code = f"""
import json
from pathlib import Path
from finealign.errors import OutputError
from finealign.export.hub import push
def say(folder, name, private):
    try:
        return push(Path(folder), name, private)
    except OutputError as error:
        return str(error)
print(json.dumps([say(*call) for call in json.loads({json.dumps(calls)!r})]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hf_told" not in done.stdout + done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.fixture
def small_export(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "parity.json").write_text('{"files": ["parity.json", "model.onnx"]}')
    (folder / "model.onnx").write_bytes(b"a graph")
    (folder / "__pycache__" / "usage.pyc").write_bytes(b"bytes")
    return folder


def test_push__every_file_arrives_and_the_token_is_the_environments(
    hub: Hub, small_export: Path, tmp_path: Path
) -> None:
    calls = [
        (str(small_export), "birds/secret", True),
        (str(small_export), "birds/public", True),
        (str(small_export), "closed/model", False),
    ]
    address, public, closed = pushed(f"http://127.0.0.1:{hub.server_port}", tmp_path / "home", calls)
    assert address.endswith("birds/secret")
    assert hub.private["birds/secret"]
    assert set(hub.files) == {"parity.json", "model.onnx"}
    assert hub.files["model.onnx"] == b"a graph"
    assert hub.tokens == {"Bearer hf_told"}
    assert "there already and public, so nothing was uploaded" in public
    assert "cannot be uploaded to closed/model" in closed
    assert "\n" not in closed


def test_push__a_hub_out_of_reach_is_one_sentence(small_export: Path, tmp_path: Path) -> None:
    (told,) = pushed("http://127.0.0.1:9", tmp_path / "home", [(str(small_export), "birds/model", False)])
    assert "cannot be uploaded to birds/model" in told
    assert "\n" not in told


def test_push__a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"parity\.json is missing"):
        push(tmp_path, "birds/model", private=False)
