"""Which precision a device computes in, told by what it says it can; no GPU is needed, and none is asked."""

from collections.abc import Callable

import pytest
import torch

from finealign.backbone.tower_backbone import image_chunk
from finealign.runtime.devices import choose_precision, fast_products

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
Gpu = Callable[[tuple[int, int]], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU of this compute capability, in what is asked of PyTorch."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capability >= (8, 0))

    return pretend


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
    ids=["P40", "V100", "T4", "A100", "H200"],
)
def test_choose_precision__auto_is_what_the_gpu_does_well(gpu: Gpu, capability: tuple[int, int], expected: str) -> None:
    gpu(capability)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("fp32", CUDA) == "fp32"


def test_choose_precision__what_is_asked_for_is_taken_everywhere() -> None:
    assert [choose_precision(asked, CPU) for asked in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert choose_precision("auto", CPU) in ("fp32", "bf16")


@pytest.mark.parametrize(("capability", "within"), [((7, 5), "highest"), ((8, 0), "high"), ((9, 0), "high")])
def test_fast_products__are_of_gpus_that_can_and_end_with_the_context(
    gpu: Gpu, capability: tuple[int, int], within: str
) -> None:
    gpu(capability)
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), fast_products(CUDA):
        assert torch.get_float32_matmul_precision() == within
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == "highest"


def test_image_chunk__is_larger_on_cuda_alone() -> None:
    assert image_chunk(CUDA) > image_chunk(CPU) == image_chunk(torch.device("mps"))
