"""Weights that users bring: files of open_clip's training, and CLIPModel folders of transformers."""

import argparse
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from conftest import TEXT_TOWER
from finealign.backbone.load import load_backbone
from finealign.config import without_folder
from finealign.errors import BackboneError

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
SENTENCES = ["a photo of a wren.", "A Reed  Warbler, it's 3 days old!", "x"]
MEAN, STD = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny architectures in open_clip's registry: ``trained-plain`` and others."""
    folder = tmp_path_factory.mktemp("architectures")
    kinds: dict[str, dict[str, Any]] = {
        "trained-plain": {"vision_cfg": VISION},
        "trained-plain-quickgelu": {"vision_cfg": VISION, "quick_gelu": True},
        "trained-wide": {"vision_cfg": VISION | {"width": 96}},
        "trained-custom": {"vision_cfg": VISION, "custom_text": True},
        "trained-resnet": {"vision_cfg": RESNET},
        "trained-timm": {"vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet"}, "custom_text": True},
        "trained-roberta": {
            "vision_cfg": VISION,
            "text_cfg": {"hf_model_name": "no/such-tower", "hf_tokenizer_name": "no/such-tower"},
        },
    }
    for name, kind in kinds.items():
        config = {"embed_dim": 32, "text_cfg": TEXT_TOWER} | kind
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)


def trained(name: str, **options: Any) -> Any:
    """open_clip's model of an architecture, as after a training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model: Any = open_clip.create_model(name, **options)
    return model.eval()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 71, 3), dtype=np.uint8))


def cosines(backbone: Any, images: list[Image.Image], sentences: list[str]) -> Tensor:
    """(images, sentences), as finealign sees them."""
    pixels = torch.stack([torch.from_numpy(np.array(backbone.geometry(image))).permute(2, 0, 1) for image in images])
    return backbone.embed(pixels) @ backbone.encode_sentences(sentences).T  # type: ignore[no-any-return]


@torch.inference_mode()
def open_clips(model: Any, images: list[Image.Image], sentences: list[str]) -> Tensor:
    """(images, sentences), as open_clip sees them."""
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    pixels = torch.stack([transform(image) for image in images])
    tokens = open_clip.SimpleTokenizer(context_length=model.context_length)(sentences)
    return normalize(model.encode_image(pixels), dim=-1) @ normalize(model.encode_text(tokens), dim=-1).T


# What a training saves, from the model's state.
Saved = Callable[[dict[str, Tensor]], Any]
CONTAINERS: dict[str, Saved] = {
    "open_clip": lambda state: {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": {"scale": 65536.0},
    },
    "bare": lambda state: state,
    "compiled": lambda state: {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "compiled, on several GPUs": lambda state: {
        "state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}
    },
    "a compiled tower": lambda state: {
        "model": {name.replace("visual.", "visual._orig_mod."): value for name, value in state.items()}
    },
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.0",
        "state_dict": {f"model.{name}": value for name, value in state.items()},
    },
    "running mean alone": lambda state: {"epoch": 1, "state_dict_ema": state},
    "running mean of torch": lambda state: {
        "model": {"n_averaged": torch.tensor(4), **{f"module.{name}": value for name, value in state.items()}}
    },
    "half": lambda state: {"state_dict": {name: value.half() for name, value in state.items()}},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_trained__wherever_the_weights_are_kept(container: str, tmp_path: Path) -> None:
    model = trained("trained-plain")
    torch.save(CONTAINERS[container](model.state_dict()), tmp_path / "epoch_3.pt")
    loaded = load_backbone(f"trained-plain/{tmp_path}/epoch_3.pt").model.state_dict()
    assert all(
        torch.equal(loaded[name], value.half().float() if container == "half" else value)
        for name, value in model.state_dict().items()
    )
    assert loaded.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trained-plain", {}),
        ("trained-plain-quickgelu", {}),
        ("trained-custom", {}),
        ("trained-plain", {"force_custom_text": True}),
        ("trained-plain", {"force_image_size": 64}),
        ("trained-plain", {"force_context_length": 40}),
        ("trained-plain", {"init_logit_bias": -10.0}),
        ("trained-resnet", {"force_image_size": 96}),
        ("trained-timm", {}),
    ],
)
def test_trained__cosines_are_open_clips(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(name, **options)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(f"{name}/{tmp_path}/weights.safetensors")
    images = [picture(0), picture(1)]
    expected = open_clips(model, images, SENTENCES)
    torch.testing.assert_close(cosines(backbone, images, SENTENCES), expected, rtol=0, atol=2e-6)
    assert expected.std() > 1e-3
    backbone.save(tmp_path / "saved")  # as a run does, to be opened elsewhere
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    torch.testing.assert_close(cosines(again, images, SENTENCES), expected, rtol=0, atol=2e-6)
    assert again.checksum == backbone.checksum


def test_trained__the_file_is_recorded_and_its_folder_is_not_told(tmp_path: Path) -> None:
    torch.save(trained("trained-plain").state_dict(), tmp_path / "epoch_3.pt")
    identifier = f"trained-plain/{tmp_path}/epoch_3.pt"
    digest = sha256((tmp_path / "epoch_3.pt").read_bytes()).hexdigest()
    assert load_backbone(identifier).origin == {"file": "epoch_3.pt", "sha256": digest}
    assert without_folder(identifier) == "trained-plain/epoch_3.pt"
    assert without_folder("hf-hub:org/name.pt") == "hf-hub:org/name.pt"
    assert without_folder("ViT-B-32/openai") == "ViT-B-32/openai"


def write_run(folder: Path, settings: dict[str, Any], name: str = "run") -> Path:
    """What open_clip's training leaves: ``params.txt``, and a checkpoint in a folder beside it."""
    (folder / "checkpoints").mkdir(parents=True)
    lines = "".join(f"{key}: {value}\n" for key, value in sorted(settings.items()))
    (folder / "params.txt").write_text(lines, encoding="utf-8")
    file = folder / "checkpoints" / "epoch_1.pt"
    torch.save({"epoch": 1, "name": name, "state_dict": trained("trained-plain").state_dict()}, file)
    return file


def test_trained__as_params_txt_says_it_was_trained(tmp_path: Path) -> None:
    settings = {"model": "trained-plain", "pretrained": "", "force_quick_gelu": True, "lr": 1e-5, "image_mean": MEAN}
    file = write_run(tmp_path / "run", settings | {"image_std": STD, "image_resize_mode": "squash"})
    backbone = load_backbone(f"trained-plain/{file}")
    assert [*backbone.mean] == MEAN and backbone.preprocess["std"] == STD
    assert backbone.preprocess["resize_mode"] == "squash"
    assert type(backbone.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert backbone.config["quick_gelu"] is True


@pytest.mark.parametrize("by", ["params", "name"])
def test_trained__another_architecture_than_the_training_says(by: str, tmp_path: Path) -> None:
    name = "2026_01_01-00_00_00-model_trained-plain-quickgelu-lr_0.001-b_8" if by == "name" else "run"
    file = write_run(tmp_path / "run", {"model": "trained-plain-quickgelu"} if by == "params" else {}, name)
    with pytest.raises(BackboneError, match=rf"was of trained-plain-quickgelu. Type trained-plain-quickgelu/{file}"):
        load_backbone(f"trained-plain/{file}")


def test_trained__images_as_for_the_listed_weights_where_these_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from finealign.backbone.trained import _preprocessing

    assert _preprocessing("ViT-B-16-SigLIP", {})["mean"] == (0.5, 0.5, 0.5)
    assert _preprocessing("ViT-B-16-SigLIP", {})["resize_mode"] == "squash"
    assert _preprocessing("ViT-L-14", {}) == {}  # two kinds


def test_trained__no_hub_for_the_text_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(trained("trained-plain").state_dict(), tmp_path / "a.pt")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"its text tower is 'no/such-tower' of transformers.*a hub within reach"):
        load_backbone(f"trained-roberta/{tmp_path}/a.pt")


def without(state: dict[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(starts)}


TEXTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
# What is in the file, and what the message says.
MISFITS: dict[str, tuple[Saved, str]] = {
    "a wider tower": (
        lambda state: trained("trained-wide").state_dict(),
        r"visual\.class_embedding is \(96,\) in the file and \(64,\) in the model.*more.*trained-wide.*ARCH/FILE",
    ),
    "a layer too few": (
        lambda state: without(state, "visual.transformer.resblocks.1."),
        r"12 of the model's \d+ tensors are not in the file \(visual.transformer.resblocks.1.*9 more",
    ),
    "a tensor too many": (lambda state: state | {"head.weight": torch.ones(2)}, r"1 of the file's \d+.*head.weight"),
    "of another library": (lambda state: {"backbone.layer1.weight": torch.ones(3)}, r"are not those of trained-plain"),
    "no text tower": (lambda state: without(state, *TEXTS), "image tower and no text tower"),
    "no image tower": (lambda state: without(state, "visual."), "text tower and no image tower"),
    "the image tower alone": (
        lambda state: {name[7:]: value for name, value in state.items() if name.startswith("visual.")},
        "an image tower alone",
    ),
    "transformers": (
        lambda state: {"vision_model.embeddings.class_embedding": torch.ones(64), "text_model.a.b": torch.ones(1)},
        r"under the names of transformers.*local-dir:FOLDER",
    ),
    "an adapter": (
        lambda state: {"base_model.model.visual.proj.lora_A.weight": torch.ones(4, 64)},
        r"an adapter \(LoRA\).*merge_and_unload",
    ),
    "no weights": (lambda state: {"epoch": 3, "optimizer": {}}, "holds no weights: epoch, optimizer"),
    "nothing": (lambda state: {}, "holds no weights"),
    "a list": (lambda state: [1, 2], "holds a list"),
    "not finite": (
        lambda state: state | {"visual.proj": torch.full((64, 32), float("nan"))},
        "not finite, in visual.proj",
    ),
    "code": (
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1)},
        r"\(argparse.Namespace\). Reading that could run code, so it was not loaded.*safetensors",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_trained__what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    make, message = MISFITS[case]
    torch.save(make(trained("trained-plain").state_dict()), tmp_path / "epoch_3.pt")
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(f"trained-plain/{tmp_path}/epoch_3.pt")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"", b"no weights", bytes(range(256)), b"PK\x03\x04torn"])
def test_trained__a_damaged_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(BackboneError, match=rf"a{suffix} .*(cannot be read as weights|no file of tensors)"):
        load_backbone(f"trained-plain/{tmp_path}/a{suffix}")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_trained__a_program_of_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(BackboneError, match=r"TorchScript archive.*are not run.*ARCH/openai"):
        load_backbone(f"trained-plain/{tmp_path}/a.pt")


def test_trained__paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "epoch_3.pt"
    torch.save(trained("trained-plain").state_dict(), file)
    for identifier, message in {
        f"trained-plain/{tmp_path}/epoch_4.pt": r"No file of weights .*epoch_4.pt",
        f"trained-plain{file}": rf"There is {file}: type trained-plain/{file}, with two slashes",
        f"trained-plain/{tmp_path}": rf"is a folder. Type the file of weights: trained-plain/{file}",
        str(file): r"is a file of weights. Type the architecture that was trained before it: ARCH/",
        f"local-dir:{tmp_path}": rf"There are weights alone: type ARCH/{file}",
        f"no-such-arch/{file}": r"Unknown architecture|names no|no pair",
    }.items():
        with pytest.raises(BackboneError, match=message):
            load_backbone(identifier)
    monkeypatch.chdir(tmp_path)
    assert load_backbone("trained-plain/epoch_3.pt").input_size == 32
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_backbone("trained-plain/~/epoch_3.pt").input_size == 32


# --- folders of transformers ------------------------------------------------------------------------------------------


def write_clip(folder: Path, *, text: dict[str, Any] | None = None, **vision: Any) -> Any:
    """A CLIPModel with random weights, saved by transformers with its image processor."""
    words = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3}
    images |= {"image_size": 48, "patch_size": 16} | vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = CLIPConfig(text_config=words | (text or {}), vision_config=images, projection_dim=24)
        untyped: Any = CLIPModel(config)
        model = untyped.eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    side = images["image_size"]
    write_processor(folder, size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model


def write_processor(folder: Path, **settings: Any) -> None:
    CLIPImageProcessor(image_mean=MEAN, image_std=STD, **settings).save_pretrained(folder)


@torch.inference_mode()
def transformers_cosines(folder: Path, images: list[Image.Image], tokens: Tensor) -> Tensor:
    """(images, sentences), as transformers sees them."""
    libraries: Any = transformers  # whose functions are not typed
    model = libraries.CLIPModel.from_pretrained(folder).eval()
    processor = libraries.AutoImageProcessor.from_pretrained(folder, backend="pil")
    logits: Tensor = model(input_ids=tokens, **processor(images, return_tensors="pt")).logits_per_image
    scale: Tensor = model.logit_scale.exp()
    return logits / scale


CLIPS: dict[str, dict[str, Any]] = {
    "quick_gelu": {},
    "gelu": {"hidden_act": "gelu", "text": {"hidden_act": "gelu"}},
    "gelu_new, another epsilon": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
        "text": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    },
    "an old end": {"text": {"eos_token_id": 2}},
    "tokens added": {"text": {"vocab_size": 49411}},
    "larger": {"image_size": 80},
    "a short window": {"text": {"max_position_embeddings": 20}},
}


@pytest.mark.parametrize("case", CLIPS)
def test_clip_folder__cosines_are_transformers(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    write_clip(folder, **CLIPS[case])
    if case == "tokens added":  # the tokenizer is in the folder, as such a fine-tuning leaves it
        write_tokenizer(folder, added=["<one>", "<two>", "<three>"])
    backbone = load_backbone(f"local-dir:{folder}")
    images = [picture(0), picture(1)]
    tokens = backbone.tokenizer(SENTENCES)
    expected = transformers_cosines(folder, images, tokens)
    torch.testing.assert_close(cosines(backbone, images, SENTENCES), expected, rtol=0, atol=3e-6)
    assert [*backbone.mean] == pytest.approx(MEAN)
    assert backbone.logit_scale == pytest.approx(CLIPModel.from_pretrained(folder).logit_scale.exp().item())
    backbone.save(tmp_path / "saved")
    shutil.rmtree(folder)
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    torch.testing.assert_close(cosines(again, images, SENTENCES), expected, rtol=0, atol=3e-6)


def write_tokenizer(folder: Path, added: list[str] | None = None, tiny: bool = False) -> Any:
    own = open_clip.SimpleTokenizer()
    names = {own.sot_token_id: "<|startoftext|>", own.eot_token_id: "<|endoftext|>"}
    vocabulary = {names.get(number, token): number for token, number in own.encoder.items()}
    merges: Any = [tuple(pair) for pair in own.bpe_ranks if len(pair) == 2]
    if tiny:
        letters = [*"abcdefghijklmnopqrstuvwxyz"]
        words = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary, merges = {word: number for number, word in enumerate(words)}, []
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.add_tokens(added or [])
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_clip_folder__its_own_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    tokenizer = write_tokenizer(folder, tiny=True)
    write_clip(folder, text={"vocab_size": len(tokenizer), "eos_token_id": len(tokenizer) - 1})
    backbone = load_backbone(f"local-dir:{folder}")
    sentences = ["a wren", "reed warbler"]
    tokens = tokenizer(sentences, padding="max_length", return_tensors="pt").input_ids
    expected = transformers_cosines(folder, [picture()], tokens)
    torch.testing.assert_close(cosines(backbone, [picture()], sentences), expected, rtol=0, atol=3e-6)
    backbone.save(tmp_path / "saved")
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    torch.testing.assert_close(cosines(again, [picture()], sentences), expected, rtol=0, atol=3e-6)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(BackboneError, match=r"has no tokenizer, and its 55 tokens are not CLIP's own 49408"):
        load_backbone(f"local-dir:{folder}")


def test_clip_folder__clips_tokens_are_open_clips_tokenizer(tmp_path: Path) -> None:
    write_clip(tmp_path)
    write_tokenizer(tmp_path)
    assert isinstance(load_backbone(f"local-dir:{tmp_path}").tokenizer, open_clip.SimpleTokenizer)


def test_clip_folder__pickled_and_sharded_weights_and_a_processor_of_its_own(tmp_path: Path) -> None:
    write_clip(tmp_path)
    whole = load_backbone(f"local-dir:{tmp_path}")
    weights = load_file(tmp_path / "model.safetensors")
    assert [*whole.origin] == ["file", "sha256"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert load_backbone(f"local-dir:{tmp_path}").checksum == whole.checksum
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(weights)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    sharded = load_backbone(f"local-dir:{tmp_path}")
    assert sharded.checksum == whole.checksum
    assert sharded.preprocess == whole.preprocess
    assert sharded.origin["file"] == "model-1.safetensors, model-2.safetensors"
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"not whole: model-2.safetensors is missing"):
        load_backbone(f"local-dir:{tmp_path}")


PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "squash": ({"size": {"height": 48, "width": 48}, "do_center_crop": False}, ""),
    "bilinear": ({"size": {"shortest_edge": 48}, "crop_size": 48, "resample": 2}, ""),
    "plain": ({"size": {"shortest_edge": 48}, "crop_size": 48, "do_normalize": False}, ""),
    "a border": ({"size": {"shortest_edge": 56}, "crop_size": 48}, "resizes to .*56.*the model takes 48"),
    "another size": ({"size": {"shortest_edge": 224}, "crop_size": 224}, "the model takes 48"),
    "no scaling": ({"size": {"shortest_edge": 48}, "crop_size": 48, "rescale_factor": 1.0}, "not scaled by 1/255"),
    "nearest": ({"size": {"shortest_edge": 48}, "crop_size": 48, "resample": 0}, "resample is 0"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_clip_folder__images_are_prepared_as_its_processor_does(case: str, tmp_path: Path) -> None:
    settings, message = PROCESSORS[case]
    write_clip(tmp_path)
    write_processor(tmp_path, **settings)
    if message:
        with pytest.raises(BackboneError, match=message):
            load_backbone(f"local-dir:{tmp_path}")
        return
    backbone = load_backbone(f"local-dir:{tmp_path}")
    tokens = backbone.tokenizer(SENTENCES)
    expected = transformers_cosines(tmp_path, [picture()], tokens)
    torch.testing.assert_close(cosines(backbone, [picture()], SENTENCES), expected, rtol=0, atol=3e-6)


TALL = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 3}
TALL |= {"image_size": 48, "patch_size": 16}


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def as_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/clip"}')


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "siglip": (lambda folder: change(folder / "config.json", model_type="siglip"), "SigLIP. open_clip has it under"),
    "two of any kind": (
        lambda folder: change(folder / "config.json", model_type="vision-text-dual-encoder"),
        "VisionTextDualEncoderModel.*CLIPModel alone is read",
    ),
    "an unknown type": (lambda folder: change(folder / "config.json", model_type="owlvit"), "of the type 'owlvit'"),
    "an adapter": (
        as_adapter,
        r"an adapter \(LoRA\) of 'org/clip'.*merge_and_unload",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights: wanted model.safetensors"),
    "torn": (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot be read as weights"),
    "a layer more": (
        lambda folder: change(folder / "config.json", vision_config=TALL),
        r"12 of the model's 74 tensors are not in the file.*resblocks.2",
    ),
    "activations that differ": (
        lambda folder: change(folder / "config.json", text_config={"hidden_act": "gelu"}),
        "its towers have different activations, quick_gelu and gelu",
    ),
    "an unknown activation": (
        lambda folder: change(
            folder / "config.json", text_config={"hidden_act": "relu"}, vision_config={"hidden_act": "relu"}
        ),
        "its activation is relu",
    ),
    "no end": (lambda folder: change(folder / "config.json", text_config={"hidden_size": 10**9}), "are not those"),
    "settings of no kind": (lambda folder: change(folder / "config.json", text_config=[1]), "no settings in text_conf"),
    "a width of no kind": (
        lambda folder: change(folder / "config.json", text_config={"hidden_size": "wide"}),
        "its settings are not CLIP's",
    ),
    "heads nought": (
        lambda folder: change(folder / "config.json", vision_config={"num_attention_heads": 0}),
        "its settings are not CLIP's",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_clip_folder__what_is_not_read_is_called_what_it_is(case: str, tmp_path: Path) -> None:
    spoil, message = CONFIGS[case]
    write_clip(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_clip_folder__a_bare_path_tells_what_to_type(tmp_path: Path) -> None:
    write_clip(tmp_path)
    with pytest.raises(BackboneError, match=rf"is a folder. Type local-dir:{tmp_path}"):
        load_backbone(str(tmp_path))


def test_hub__a_repository_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "abc"  # named after its commit, as the cache does
    write_clip(snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["pytorch_model.bin"])
    found = load_backbone("hf-hub:org/clip@abc")
    assert found.origin == {"repository": "org/clip", "revision": "abc"}
    assert found.input_size == 48
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"its weights as pytorch_model.bin alone.*not taken from a hub"):
        load_backbone("hf-hub:org/clip")
