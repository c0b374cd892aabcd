"""Text towers of transformers: a saved model opens, predicts and is exported with the network off."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from conftest import CLASSES, VISION_TOWERS, open_clip_backbone, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.backbone.load import load_backbone
from finealign.errors import BackboneError, ConfigError, FinealignError
from finealign.export.onnx import Graph
from finealign.export.run import export

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
FEEDS = {"encoder_ffn_dim": 37, "decoder_ffn_dim": 37}
TOWERS: dict[str, dict[str, Any]] = {
    "roberta": SIZES | {"max_position_embeddings": 160},
    "xlm-roberta": SIZES | {"max_position_embeddings": 160},
    "bert": SIZES | {"max_position_embeddings": 160},
    "mt5": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 37, "d_kv": 16},
    "m2m_100": {"d_model": 32, "max_position_embeddings": 160} | LAYERS | FEEDS,
}
FIRST = ("bert", "m2m_100")  # pool by their first token


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and no cache of one: here, and in the processes that a test starts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))


def write_backbone(folder: Path, kind: str) -> Path:
    """An open_clip folder with a text tower of transformers at random weights, as one copied from a hub."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({one: number for number, one in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends: list[tuple[str, int]] = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrapper: Any = PreTrainedTokenizerFast
    fast = wrapper(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **names)
    fast.save_pretrained(folder)
    tower = AutoConfig.for_model(kind, vocab_size=40, pad_token_id=1, **TOWERS[kind])
    tower.save_pretrained(folder / "on-the-hub")
    text = {"hf_model_name": str(folder / "on-the-hub"), "hf_tokenizer_name": "org/tower", "hf_proj_type": "linear"}
    text["hf_pooler_type"] = "cls_pooler" if kind in FIRST else "mean_pooler"
    config = {"embed_dim": 32, "vision_cfg": VISION_TOWERS["transformer"], "text_cfg": text}
    described = {"model_cfg": config, "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def change(path: Path, section: str, **values: Any) -> None:
    """Change values in a section, named with dots, of a JSON file."""
    described = place = json.loads(path.read_text(encoding="utf-8"))
    for name in section.split(".") if section else []:
        place = place[name]
    place.update(values)
    path.write_text(json.dumps(described), encoding="utf-8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("text") / "photos", each=2)


def scores(model: FineAlign, photos: Path) -> Any:
    return np.stack([found.scores for found in predictions(model, sorted(photos.rglob("*.png")))])


def saved_model(folder: Path, kind: str, photos: Path) -> tuple[FineAlign, Path]:
    """A model adapted on such a backbone, which is then gone, and the folder that it was saved in."""
    backbone = write_backbone(folder / "backbone", kind)
    config = tiny_config(f"local-dir:{backbone}", training__epochs=1)
    model = FineAlign(CLASSES, config=config).fit(photos)
    model.save(folder / "saved")
    shutil.rmtree(backbone)
    return model, folder / "saved"


@pytest.mark.filterwarnings("ignore::finealign.errors.CautionWarning")
@pytest.mark.parametrize("kind", TOWERS)
def test_saved__opens_without_a_hub_and_encodes_the_same(kind: str, tmp_path: Path, photos: Path) -> None:
    backbone = load_backbone(f"local-dir:{write_backbone(tmp_path / 'backbone', kind)}")
    expected = backbone.encode_sentences(["a wren", "reed warbler"])
    backbone.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "backbone")
    again = load_backbone(f"local-dir:{tmp_path / 'saved'}")
    torch.testing.assert_close(again.encode_sentences(["a wren", "reed warbler"]), expected, rtol=0, atol=1e-6)
    assert again.checksum == backbone.checksum
    assert str(tmp_path) not in (tmp_path / "saved" / "open_clip_config.json").read_text()
    assert str(tmp_path) not in (tmp_path / "saved" / "text_tower" / "config.json").read_text()


@pytest.mark.filterwarnings("ignore::finealign.errors.CautionWarning")
def test_saved__predicts_and_is_exported_without_a_hub(tmp_path: Path, photos: Path) -> None:
    model, folder = saved_model(tmp_path, "roberta", photos)
    loaded = FineAlign.load(folder, device="cpu", precision="fp32")
    assert np.array_equal(scores(loaded, photos), scores(model, photos))
    (tmp_path / "elsewhere").mkdir()
    found = export(loaded, tmp_path / "elsewhere" / "open_clip", format="open_clip")
    assert "text_tower" in found.files
    assert "one of transformers" in found.notes[0]
    with pytest.raises(ConfigError, match=r"a CustomTextCLIP, with a text tower of another kind.*--format onnx"):
        export(loaded, tmp_path / "hf", format="hf")


@pytest.mark.filterwarnings("ignore::finealign.errors.CautionWarning")
def test_saved__without_the_towers_configuration_images_are_predicted_and_texts_refused(
    tmp_path: Path, photos: Path
) -> None:
    """As models that were saved before their folder had it."""
    model, folder = saved_model(tmp_path, "bert", photos)
    shutil.rmtree(folder / "text_tower")
    change(folder / "open_clip_config.json", "model_cfg.text_cfg", hf_model_name="org/tower")
    loaded = FineAlign.load(folder, device="cpu", precision="fp32")
    assert np.array_equal(scores(loaded, photos), scores(model, photos))
    with pytest.raises(BackboneError, match=r"its text tower is 'org/tower' of transformers.*text_tower/config.json"):
        loaded.backbone_.encode_sentences(["a"])
    loaded.save(tmp_path / "again")
    before, after = (load_file(one / "open_clip_model.safetensors") for one in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert np.array_equal(
        scores(FineAlign.load(tmp_path / "again", device="cpu", precision="fp32"), photos), scores(model, photos)
    )
    with pytest.raises(FinealignError, match="cannot encode texts here"):
        export(loaded, tmp_path / "open_clip", format="open_clip")
    graph = Graph(open_clip_backbone(loaded), loaded.method_, "global").eval()  # what an ONNX file is written from
    assert graph(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0].shape == (1, 3)
    # To adapt, texts are needed: said when the backbone is loaded.
    with pytest.raises(BackboneError, match=r"cannot encode texts here.*a hub within reach") as caught:
        load_backbone(f"local-dir:{folder}")
    assert "\n" not in str(caught.value)
    # A tokenizer that is missing does not stop images either.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert np.array_equal(scores(FineAlign.load(folder, device="cpu", precision="fp32"), photos), scores(model, photos))


@pytest.mark.parametrize("identifier", ["roberta-ViT-B-32/random"])
def test_load_backbone__a_text_tower_on_a_hub_is_told(identifier: str) -> None:
    with pytest.raises(
        BackboneError, match=r"its text tower is 'roberta-base' of transformers, which is not to be had"
    ):
        load_backbone(identifier)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"auto_map": {"AutoConfig": "code.Own"}}, "by auto_map; remove"),
    "layers without end": ({"num_hidden_layers": 10**12}, "cannot fill"),
    "width without end": ({"hidden_size": 10**9}, "cannot fill"),
    "vocabulary without end": ({"vocab_size": 10**12}, "cannot fill"),
    "unknown": ({"model_type": "no-such"}, "cannot encode texts here"),
    "another width": ({"hidden_size": 64}, "size mismatch"),
}


def test_load_backbone__bad_configurations_of_text_towers(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "backbone", "roberta")
    config = folder / "on-the-hub" / "config.json"
    good = config.read_text()
    for values, message in BAD.values():
        config.write_text(good)
        change(config, "", **values)
        with pytest.raises(BackboneError, match=message) as caught:
            load_backbone(f"local-dir:{folder}")
        assert "\n" not in str(caught.value)
    config.write_text("[")
    with pytest.raises(BackboneError, match="does not load"):
        load_backbone(f"local-dir:{folder}")
