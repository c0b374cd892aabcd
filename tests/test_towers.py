"""Working copies of image towers: they compute what the tower computes, and what is learned through them is its own."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import open_clip.transformer
import pytest
import timm
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from finealign.backbone.load import load_backbone
from finealign.backbone.towers import (
    Float32Gradient,
    SelfAttention,
    attend,
    is_convolutional,
    is_normalisation,
    token_width,
    tokens_of,
    working_copy,
)

Tiny = Callable[[str], str]
Make = Callable[[str], nn.Module]

TOWERS = ["transformer", "convolutional", "depthwise", "timm transformer", "root mean squares", "groups"]
over_towers = pytest.mark.parametrize("kind", TOWERS)
over_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def by_hand(kind: str) -> nn.Module:
    if kind == "root mean squares":
        return nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4),
            timm.layers.RmsNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
            nn.Flatten(),
            nn.Linear(128, 24),
            nn.RMSNorm(24),
            nn.Linear(24, 24),
            timm.layers.RmsNorm(24),
            nn.Linear(24, 16),
        )
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=4),
        timm.layers.LayerNorm2d(12),
        nn.Flatten(),
        nn.Linear(108, 16),
    )


@pytest.fixture
def make(tiny_backbone: Tiny) -> Make:
    """A tower of a kind with the same weights each time, in evaluation mode, of which nothing learns."""

    def made(kind: str) -> nn.Module:
        if kind in ("transformer", "convolutional"):
            loaded: nn.Module = load_backbone(tiny_backbone(kind)).model.visual
            return loaded
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            if kind in ("depthwise", "timm transformer"):
                name = "test_efficientnet" if kind == "depthwise" else "test_vit"
                size = {} if kind == "depthwise" else {"img_size": 32}
                tower: nn.Module = timm.create_model(name, num_classes=16, **size)
            else:
                tower = by_hand(kind)
            for parameter in tower.parameters():  # a fresh normalisation is the identity
                if parameter.ndim == 1:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in tower.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(0.2 * torch.rand_like(buffer))
        return tower.eval().requires_grad_(False)

    return made


def pixels(count: int = 4, *, seed: int = 0) -> Tensor:
    """(count, 3, 32, 32), much as a backbone normalises them, in colours that even an untrained tower tells apart."""
    generator = torch.Generator().manual_seed(seed)
    colours = 2 * torch.randn(count, 3, 1, 1, generator=generator)
    return colours + torch.randn(count, 3, 32, 32, generator=generator)


def norms(tower: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in tower.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.RMSNorm)
        or type(module).__name__ in ("RmsNorm", "RmsNorm2d")
        for name, parameter in module.named_parameters(recurse=False)
    }


def learned(tower: nn.Module, through: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The gradient that each normalisation parameter of the tower gets when ``through`` is run; all others get none."""
    parameters = norms(tower)
    for parameter in parameters.values():
        parameter.grad = None
        parameter.requires_grad_(True)
    out = through(images).float()
    torch.autograd.backward((out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum())
    reached = {id(p) for p in (*tower.parameters(), *through.parameters()) if p.grad is not None}
    assert reached == {id(parameter) for parameter in parameters.values()}
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def strided_depthwise(tower: nn.Module) -> list[nn.Conv2d]:
    found = [module for module in tower.modules() if isinstance(module, nn.Conv2d)]
    return [conv for conv in found if conv.groups > 1 and conv.stride != (1, 1)]


def identities(tensors: Iterable[Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors}


# --- working_copy -----------------------------------------------------------------------------------------------------


@over_towers
@pytest.mark.parametrize("gradient", [False, True])
def test_working_copy__in_float32_computes_the_same(make: Make, kind: str, gradient: bool) -> None:
    tower = make(kind)
    with torch.set_grad_enabled(gradient):
        found = working_copy(tower, dtype=torch.float32)(pixels())
        wanted = tower(pixels())
    assert found.dtype == torch.float32
    assert wanted.std(0).min() > 1e-3  # the images are told apart
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@over_towers
def test_working_copy__in_float32_shares_every_weight(make: Make, kind: str) -> None:
    tower = make(kind)
    found = dict(working_copy(tower, dtype=torch.float32).named_parameters())
    assert found.keys() == dict(tower.named_parameters()).keys()
    assert all(found[name] is parameter for name, parameter in tower.named_parameters())


@over_towers
@pytest.mark.parametrize("on", ["cpu", "cuda"])
@pytest.mark.parametrize("gradient", [False, True])
def test_working_copy__in_bf16_computes_nearly_the_same(make: Make, kind: str, gradient: bool, on: str) -> None:
    tower = make(kind)
    for parameter in norms(tower).values():
        parameter.requires_grad_(gradient)
    rough = working_copy(tower, dtype=torch.bfloat16, on=on)(pixels().bfloat16())
    assert rough.dtype == torch.bfloat16
    assert rough.requires_grad == gradient
    found, wanted = rough.detach().float(), tower(pixels()).detach()
    assert float(cosine_similarity(found, wanted).min()) > 0.999
    common = wanted.mean(0)  # it hides what tells the images apart
    assert float(cosine_similarity(found - common, wanted - common).min()) > 0.97


@over_towers
def test_working_copy__in_bf16_warns_of_nothing(make: Make, kind: str) -> None:
    made = working_copy(make(kind), dtype=torch.bfloat16)
    torch.set_warn_always(True)  # else what warned elsewhere already is silent here; a warning is an error in the tests
    try:
        made(pixels().bfloat16())
    finally:
        torch.set_warn_always(False)


@over_towers
def test_working_copy__in_bf16_shares_the_norms_and_casts_the_rest(make: Make, kind: str) -> None:
    tower = make(kind).requires_grad_(True)
    made = working_copy(tower, dtype=torch.bfloat16)
    own, wanted = identities(tower.parameters()), norms(tower)
    assert wanted
    exact = strided_depthwise(tower)
    shared = [parameter for parameter in made.parameters() if id(parameter) in own]
    cast = [parameter for parameter in made.parameters() if id(parameter) not in own]
    assert identities(shared) == identities([*wanted.values(), *(p for conv in exact for p in conv.parameters())])
    assert len(cast) == len(own) - len(wanted)
    assert {parameter.dtype for parameter in shared} == {torch.float32}
    assert {parameter.dtype for parameter in cast} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in cast)
    assert all(parameter.requires_grad for parameter in shared)


@over_towers
def test_working_copy__in_bf16_keeps_the_buffers_of_norms(make: Make, kind: str) -> None:
    tower = make(kind)
    made = working_copy(tower, dtype=torch.bfloat16)
    wanted = {
        f"{prefix}.{name}": value
        for prefix, module in tower.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name, value in module.named_buffers()
    }
    assert bool(wanted) == (kind in ("convolutional", "depthwise"))
    found = dict(made.named_buffers())
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_working_copy__in_bf16_casts_other_buffers_that_hold_fractions() -> None:
    tower = nn.Linear(2, 2)
    tower.register_buffer("table", torch.ones(2))
    tower.register_buffer("order", torch.arange(2))
    made = working_copy(tower, dtype=torch.bfloat16)
    assert {name: value.dtype for name, value in made.named_buffers()} == {
        "table": torch.bfloat16,
        "order": torch.int64,
    }
    assert tower.get_buffer("table").dtype == torch.float32


@over_towers
@over_types
def test_working_copy__leaves_the_tower_as_it_was(make: Make, kind: str, dtype: torch.dtype) -> None:
    tower = make(kind)
    before, values = tower(pixels()), {name: value.clone() for name, value in tower.state_dict().items()}
    kinds = [(name, type(module)) for name, module in tower.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in tower.named_parameters()]
    made = working_copy(tower, dtype=dtype)
    with torch.no_grad():
        made(pixels().to(dtype))
    assert torch.equal(tower(pixels()), before)
    assert [(name, type(module)) for name, module in tower.named_modules()] == kinds
    assert [(name, parameter.requires_grad) for name, parameter in tower.named_parameters()] == flags
    after = tower.state_dict()
    assert after.keys() == values.keys()
    for name, value in after.items():
        assert value.dtype == values[name].dtype
        assert torch.equal(value, values[name])


@over_towers
def test_working_copy__in_float32_gives_the_towers_gradients(make: Make, kind: str) -> None:
    tower = make(kind)
    wanted = learned(tower, tower, pixels())
    found = learned(tower, working_copy(tower, dtype=torch.float32), pixels())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@over_towers
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_working_copy__in_bf16_gives_nearly_the_towers_gradients(make: Make, kind: str, on: str) -> None:
    tower = make(kind)
    wanted = learned(tower, tower, pixels(8))
    found = learned(tower, working_copy(tower, dtype=torch.bfloat16, on=on), pixels(8).bfloat16())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        assert float(cosine_similarity(found[name], gradient, dim=0)) > 0.97, name
    first, second = (torch.cat(list(gradients.values())) for gradients in (found, wanted))
    assert float(cosine_similarity(first, second, dim=0)) > 0.99


@over_types
def test_working_copy__follows_what_the_tower_learns(make: Make, dtype: torch.dtype) -> None:
    tower = make("transformer")
    made = working_copy(tower, dtype=dtype)
    before = made(pixels().to(dtype))
    for parameter in norms(tower).values():
        parameter.data.mul_(1.3).add_(0.1)
    after = made(pixels().to(dtype))
    assert float(cosine_similarity(after.float(), before.float()).min()) < 0.99
    assert float(cosine_similarity(after.float(), tower(pixels())).min()) > 0.999


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["transformer", "convolutional"])
def test_working_copy__made_in_inference_mode_can_be_trained(tiny_backbone: Tiny, kind: str, precision: Any) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for embeds_first in (True, False):
        backbone = load_backbone(tiny_backbone(kind), precision=precision)
        if embeds_first:
            backbone.embed(images)
        parameters = backbone.norm_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        torch.autograd.backward(backbone.encode_images(images)[:, 0].sum())
        gradients.append([parameter.grad for parameter in parameters.values()])
    for first, second in zip(*gradients, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def test_working_copy__in_bf16_leaves_timms_fused_attention(make: Make) -> None:
    """So that its attention is the formula as written, as ``attend`` has it; only in the copy."""
    tower = make("timm transformer")
    exact, rough = (working_copy(tower, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))

    def fused(module: nn.Module) -> list[bool]:
        return [bool(part.fused_attn) for part in module.modules() if hasattr(part, "fused_attn")]

    layers = len(fused(tower))
    assert layers > 0
    assert fused(tower) == fused(exact) == [True] * layers
    assert fused(rough) == [False] * layers


@over_towers
def test_working_copy__for_a_gpu_gives_its_norms_what_cuda_can_compute(make: Make, kind: str) -> None:
    """CUDA's kernels refuse a float32 scale for values of 16 bits, but BatchNorm's; and what helps a CPU stays away."""
    made = working_copy(make(kind), dtype=torch.bfloat16, on="cuda")
    told: list[tuple[nn.Module, torch.dtype, torch.dtype]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        told.append((module, inputs[0].dtype, output.dtype))

    for module in made.modules():
        assert not isinstance(module, Float32Gradient)
        assert getattr(module, "fused_attn", True) is True
        if is_normalisation(module):
            module.register_forward_hook(note)
    made(pixels().bfloat16())
    assert told
    for module, taken, given in told:
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert taken == (torch.bfloat16 if batch else torch.float32), module
        assert given == torch.bfloat16, module


# --- is_normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.RMSNorm(4),
        timm.layers.LayerNorm(4),
        timm.layers.LayerNorm2d(4),
        timm.layers.GroupNorm(4, num_groups=2),
        timm.layers.GroupNorm1(4),
        timm.layers.BatchNormAct2d(4),
        timm.layers.RmsNorm(4),
        timm.layers.RmsNorm2d(4),
        open_clip.transformer.LayerNorm(4),
        open_clip.transformer.LayerNormFp32(4),
    ],
    ids=lambda module: f"{type(module).__module__}.{type(module).__name__}",
)
def test_is_normalisation__what_scales_and_shifts(module: nn.Module) -> None:
    assert is_normalisation(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Identity(),
        nn.Embedding(4, 4),
        nn.PReLU(4),
        nn.MultiheadAttention(4, 2),
        nn.Sequential(nn.LayerNorm(4)),
        timm.layers.Mlp(4, norm_layer=nn.LayerNorm),
        open_clip.transformer.LayerScale(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_is_normalisation__nothing_else(module: nn.Module) -> None:
    assert not is_normalisation(module)


@over_towers
def test_is_convolutional__is_told_by_batchnorm(make: Make, kind: str) -> None:
    assert is_convolutional(make(kind)) is (kind in ("convolutional", "depthwise"))


# --- SelfAttention ----------------------------------------------------------------------------------------------------


def attention(*, width: int = 24, heads: int = 3, **options: Any) -> nn.MultiheadAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = nn.MultiheadAttention(width, heads, **({"batch_first": True} | options))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()  # they start at nought
    return made.eval()


def sequence(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (2, 7, 24)), generator=torch.Generator().manual_seed(seed))


def own(made: nn.MultiheadAttention) -> SelfAttention:
    found = working_copy(made, dtype=torch.float32)
    assert type(found) is SelfAttention
    assert type(made) is nn.MultiheadAttention
    return found


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 24), (5, 3, 24), (1, 50, 24)], ids=str)
def test_self_attention__equals_pytorchs(shape: tuple[int, ...], bias: bool, gradient: bool) -> None:
    made, given = attention(bias=bias), sequence(*shape)
    inputs = [given.clone().requires_grad_(gradient) for _ in range(2)]
    wanted, nothing = made(inputs[0], inputs[0], inputs[0], need_weights=False)
    found, weights = own(made)(inputs[1], inputs[1], inputs[1], need_weights=False)
    assert nothing is weights is None
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    if gradient:
        for out in (wanted, found):
            torch.autograd.backward((out * sequence(*shape, seed=2)).sum())
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)


LATER = torch.ones(7, 7).triu(1).bool()  # what a causal mask hides
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


@pytest.mark.parametrize(
    ("made", "queries", "others", "arguments", "options"),
    [
        pytest.param({}, (2, 7, 24), None, (), {"attn_mask": LATER}, id="a mask"),
        pytest.param({}, (2, 7, 24), None, (), {"key_padding_mask": PADDING}, id="padding"),
        pytest.param({}, (2, 7, 24), None, (PADDING,), {"need_weights": False}, id="padding by position"),
        pytest.param({}, (2, 7, 24), None, (PADDING, False), {}, id="both by position"),
        pytest.param({}, (2, 3, 24), (2, 7, 24), (), {}, id="another sequence"),
        pytest.param({}, (2, 7, 24), (2, 7, 24), (), {}, id="another of the same length"),
        pytest.param({}, (2, 7, 24), None, (), {"need_weights": True}, id="weights"),
        pytest.param({}, (2, 7, 24), None, (), {"need_weights": True, "average_attn_weights": False}, id="each head's"),
        pytest.param({"batch_first": False}, (7, 2, 24), None, (), {}, id="batch second"),
        pytest.param({}, (7, 24), None, (), {}, id="no batch"),
        pytest.param({"add_bias_kv": True}, (2, 7, 24), None, (), {}, id="a learned key"),
        pytest.param({"add_zero_attn": True}, (2, 7, 24), None, (), {}, id="a key of nought"),
    ],
)
def test_self_attention__leaves_anything_else_to_pytorch(
    made: dict[str, Any],
    queries: tuple[int, ...],
    others: tuple[int, ...] | None,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    layer, query = attention(**made), sequence(*queries)
    key = query if others is None else sequence(*others, seed=1)
    if not arguments:
        options = {"need_weights": False} | options
    # Under recorded gradients, where PyTorch itself takes no short cut.
    wanted, weights = layer(query, key, key, *arguments, **options)
    found, own_weights = own(layer)(query, key, key, *arguments, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (own_weights is None) == (weights is None) == (not options.get("need_weights", False))
    if weights is not None:
        torch.testing.assert_close(own_weights, weights, rtol=1e-5, atol=1e-6)


def test_self_attention__weights_are_the_default() -> None:
    """As in PyTorch: without ``need_weights`` they are given."""
    layer, query = attention(), sequence()
    assert own(layer)(query, query, query)[1].shape == (2, 7, 7)


def test_self_attention__takes_no_place_of_a_layer_with_other_widths() -> None:
    layer = attention(kdim=8, vdim=8)
    assert type(working_copy(layer, dtype=torch.float32)) is nn.MultiheadAttention


def test_self_attention__takes_no_place_of_a_layer_with_a_forward_of_its_own() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            found, weights = super().forward(*arguments, **options)
            return 2 * found, weights

    layer, query = Doubled(24, 3, batch_first=True).eval(), sequence()
    wanted = layer(query, query, query, need_weights=False)[0]
    found = working_copy(layer, dtype=torch.float32)(query, query, query, need_weights=False)[0]
    assert torch.equal(found, wanted)


# --- attend -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 1), (3, 2, 1, 4), (1, 2, 40, 16)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)],
    ids=["float64", "float32", "bfloat16"],
)
def test_attend__is_the_formula(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    given = [sequence(*shape, seed=seed).to(dtype) for seed in range(3)]
    found = attend(*given)
    query, key, value = (one.double() for one in given)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / shape[-1] ** 0.5
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    wanted = torch.einsum("bhij,bhjd->bhid", shares, value)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend__large_scores_stay_finite(dtype: torch.dtype) -> None:
    query = 100 * sequence(1, 1, 6, 4).to(dtype)
    found = attend(query, query, torch.eye(6).to(dtype)[None, None])
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.float().sum(-1), torch.ones(1, 1, 6), rtol=0, atol=0.02)


# --- Float32Gradient --------------------------------------------------------------------------------------------------


def depthwise(**options: Any) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        made = nn.Conv2d(8, 8, 3, **({"stride": 2, "padding": 1, "groups": 8} | options))
    return made.requires_grad_(False)


def pictures(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_float32_gradient__same_values_with_and_without_gradients() -> None:
    conv = depthwise()
    made = Float32Gradient(conv, torch.bfloat16)
    with_gradients = made(pictures())
    with torch.no_grad():
        without = made(pictures())
    with torch.inference_mode():
        inferred = made(pictures())
    wanted = conv(pictures().float())
    assert with_gradients.dtype == without.dtype == torch.bfloat16
    assert torch.equal(with_gradients, wanted.bfloat16())  # exact, and then rounded once
    assert torch.equal(without, copy.deepcopy(conv).bfloat16()(pictures()))
    assert torch.equal(inferred, without)
    torch.testing.assert_close(without.float(), wanted, rtol=2**-7, atol=2**-6)


def test_float32_gradient__is_that_of_the_convolution() -> None:
    conv = depthwise()
    rough, exact = pictures().requires_grad_(True), pictures().float().requires_grad_(True)
    for out in (Float32Gradient(conv, torch.bfloat16)(rough), conv(exact)):
        torch.autograd.backward(out.float().square().sum())
    assert rough.grad is not None
    assert exact.grad is not None
    assert rough.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rough.grad.float(), exact.grad, rtol=2**-6, atol=2**-5)


def test_float32_gradient__does_not_touch_the_convolution() -> None:
    conv = depthwise()
    before = copy.deepcopy(conv.state_dict())
    made = Float32Gradient(conv, torch.bfloat16)
    assert made.exact is conv
    assert {parameter.dtype for parameter in made.fast.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
    assert {parameter.dtype for parameter in conv.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "wrapped"),
    [
        ({}, True),
        ({"stride": (1, 2)}, True),
        ({"groups": 2}, True),
        ({"bias": False}, True),
        ({"stride": 1}, False),
        ({"groups": 1}, False),
    ],
    ids=str,
)
def test_working_copy__wraps_strided_depthwise_convolutions(options: dict[str, Any], wrapped: bool) -> None:
    tower = nn.Sequential(nn.Sequential(depthwise(**options)))
    rough, exact = (working_copy(tower, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert sum(isinstance(module, Float32Gradient) for module in rough.modules()) == wrapped
    assert not any(isinstance(module, Float32Gradient) for module in exact.modules())
    torch.testing.assert_close(rough(pictures()).float(), tower(pictures().float()), rtol=2**-6, atol=2**-5)


def test_working_copy__wraps_each_of_a_mobile_network(make: Make) -> None:
    tower = make("depthwise")
    found = [
        module for module in working_copy(tower, dtype=torch.bfloat16).modules() if isinstance(module, Float32Gradient)
    ]
    assert len(found) == len(strided_depthwise(tower)) > 0


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width"), [("transformer", 64), *((kind, 0) for kind in TOWERS[1:])])
def test_token_width__is_that_of_open_clips_transformers(make: Make, kind: str, width: int) -> None:
    assert token_width(make(kind)) == width


def test_token_width__of_a_tower_that_pools_by_attention_is_none() -> None:
    sizes = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "heads": 2, "mlp_ratio": 1.0}
    for pooled in (False, True):
        tower = open_clip.transformer.VisionTransformer(**sizes, attentional_pool=pooled, output_dim=64)
        assert token_width(tower) == (0 if pooled else 64)


@pytest.mark.parametrize("prompts", [None, torch.ones(3, 64)], ids=["none", "three"])
def test_tokens_of__are_the_class_token_and_the_patches_at_each_call(make: Make, prompts: Tensor | None) -> None:
    tower = make("transformer")
    seen: list[tuple[int, ...]] = []
    hook = tower.get_submodule("transformer").register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    with tokens_of(tower, prompts) as found:
        pooled = [tower(pixels(count)) for count in (4, 1)]
    hook.remove()
    assert [tokens.shape for tokens in found] == [(4, 5, 64), (1, 5, 64)]  # 2 x 2 patches
    assert seen == [(count, 5 if prompts is None else 8, 64) for count in (4, 1)]
    module: Any = tower
    for tokens, wanted in zip(found, pooled, strict=True):
        torch.testing.assert_close(module.ln_post(tokens[:, 0]) @ module.proj, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_tokens_of__takes_its_hooks_away(make: Make, fails: bool) -> None:
    tower = make("transformer")
    before = tower(pixels())
    try:
        with tokens_of(tower, torch.ones(3, 64)):
            assert not torch.equal(tower(pixels()), before)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert torch.equal(tower(pixels()), before)
    inner = tower.get_submodule("transformer")
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks
