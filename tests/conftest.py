"""Tiny backbones with random weights, small photos made on the spot, and the real data where it is to be had."""

import ctypes
import json
import os

# Before torch is imported, here and in every process that a test starts: the models are tiny, so that threads of one
# process would wait for one another more than they compute, above all where tests run on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_data import ADVICE, shared_folder

# Seconds after which a test takes what it waits for to be hanging: no machine is so slow. Tests wait for events, and
# none asserts how long anything takes.
HANG = 300
DEVICE = "cpu"  # of ``tiny_config``; ``pytest --device cuda`` changes it
CLASSES = ["red", "green", "blue"]
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CAP_VERSION = 0x20080522
PR_SET_SECUREBITS, SECBIT_NOROOT = 28, 1
TEXT_TOWER = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION_TOWERS: dict[str, dict[str, Any]] = {
    "transformer": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "convolutional": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
    "timm": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
    "siglip": {  # not tiny: for a GPU
        "image_size": 224,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "linear",
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="what runs are made on, where a test does not say it"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from the tests and from the processes that they start, unless they are asked for."""
    wanted = config.getoption("--device")
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no GPU here. Leave it out.")
    global DEVICE
    DEVICE = wanted


@pytest.fixture(scope="module")
def usual_memory() -> Iterator[None]:
    """For modules that run verbs, which tune the allocator of their own process; a test's has other tests to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Any:
    """The device of a test of what differs between devices: the CPU, and a GPU where ``--device cuda`` asks for it."""
    import torch

    if request.param == "cuda" and request.config.getoption("--device") != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing lands in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> Iterator[None]:
    """CLIP's 49,408 words are read once, not for each of the many backbones that tests load."""
    from open_clip.tokenizer import SimpleTokenizer

    made: dict[str, dict[str, Any]] = {}
    read = SimpleTokenizer.__init__

    def begin(self: SimpleTokenizer, *values: Any, **options: Any) -> None:
        asked = repr((values, options))
        if asked not in made:
            read(self, *values, **options)
            made[asked] = dict(vars(self))
        vars(self).update(made[asked])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTokenizer, "__init__", begin)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photos and MiniCLIP, which a stranger's clone does not have."""
    folder = shared_folder()
    if not (folder / "models" / "miniclip").is_dir():
        pytest.skip(f"no real photos here. {ADVICE}")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The identifier of a tiny backbone with seeded random weights, by a name in ``VISION_TOWERS``."""
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            made[kind] = f"local-dir:{_write_backbone(tmp_path_factory.mktemp(kind), VISION_TOWERS[kind])}"
        return made[kind]

    return make


def _write_backbone(folder: Path, vision: dict[str, Any]) -> Path:
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    model_cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT_TOWER}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIP(**model_cfg)
        # A fresh BatchNorm or LayerNorm is the identity; these differ from it, so that a lost one is noticed.
        for parameter in model.visual.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    preprocess_cfg = {
        "size": vision["image_size"],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
    }
    described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images of each of three colours, in class folders: ``red/0.png`` and so on, of several sizes."""
    return write_photos(tmp_path / "photos")


def write_photos(folder: Path, *, each: int = 8) -> Path:
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            height, width = generator.integers(24, 60, 2)
            noise = generator.integers(-40, 40, (height, width, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def tiny_config(backbone: str, **overrides: Any) -> Any:
    """A resolved-able configuration that runs in a second: dotted keys with ``__`` for the dot."""
    from finealign.config import read_config

    values: dict[str, Any] = {
        "backbone": backbone,
        "device": DEVICE,
        "precision": "fp32",
        "views__crops": 2,
        "training__epochs": 3,
        "training__batch_size": 8,
        "training__learning_rate": 1e-3,
        "training__anchor_learning_rate": 1e-3,
        "training__anchor_steps": 8,  # the usual number takes longer than all the rest of such a run
        "prediction__calibrate": False,  # which costs a second; tests/test_calibration.py turns it on
    }
    return read_config(None, (), **(values | overrides))


def on_every_core() -> dict[str, str]:
    """The environment of a process that has real work to do: all threads, which sleep while other tests compute."""
    return os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}


def predictions(model: Any, paths: Iterable[Path], **how: Any) -> list[Any]:
    """The predictions of the images that can be read."""
    from finealign.types import Prediction

    return [outcome for outcome in model.iter_predictions(paths, **how) if isinstance(outcome, Prediction)]


def open_clip_backbone(model: Any) -> Any:
    """The backbone of a fitted model as the open_clip one that it is."""
    from finealign.backbone.model import OpenClipBackbone

    assert isinstance(model.backbone_, OpenClipBackbone)
    return model.backbone_


@contextmanager
def unprivileged() -> Iterator[None]:
    """For this thread, those it starts and the processes they start: modes of files count even for root."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAP_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of higher capabilities

    def call(function: str, *arguments: Any) -> None:
        if getattr(libc, function)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    call("capget", header, sets)
    effective = sets[0]
    sets[0] = effective & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    call("capset", header, sets)
    call("prctl", PR_SET_SECUREBITS, SECBIT_NOROOT, 0, 0, 0)
    try:
        yield
    finally:
        call("prctl", PR_SET_SECUREBITS, 0, 0, 0, 0)
        sets[0] = effective
        call("capset", header, sets)
