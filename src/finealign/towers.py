"""How an image tower is run: the same weights, arranged for the processor at hand.

A working copy computes what the tower it was made from computes, up to rounding. It shares the normalisation
parameters with it, in float32, so what is learned through the copy is learned by the model that is saved; the weights
that never learn are cast once, not at every call.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module only scales and shifts: the layers whose parameters are learned. Step 8 of METHOD."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, *_root_mean_squares()))


def is_convolutional(tower: nn.Module) -> bool:
    """Whether BatchNorm marks a tower as a convolutional one."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules())


def working_copy(tower: nn.Module, *, dtype: torch.dtype) -> nn.Module:
    """A tower for use beside ``tower``: its normalisation parameters shared, its other weights in ``dtype``.

    In float32 every weight is shared and none is copied. Gradients through the copy arrive at the shared parameters.
    It takes images in ``dtype``.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in tower.parameters()}
    made = copy.deepcopy(tower, shared)
    _arrange(made, dtype)
    return made


def _arrange(module: nn.Module, dtype: torch.dtype) -> None:
    if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim:
        module.__class__ = SelfAttention
    if dtype != torch.float32:
        if getattr(module, "fused_attn", False) is True:  # timm's name for what `attend` decides
            setattr(module, "fused_attn", False)  # noqa: B010, no attribute that every module has
        if isinstance(module, _root_mean_squares()):  # the one kind that does not take a float32 scale in bf16
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            module.register_forward_hook(lambda _, __, output: output.to(dtype))
        if not is_normalisation(module):
            _cast_own(module, dtype)
    for name, child in module.named_children():
        if dtype != torch.float32 and _is_strided_depthwise(child):
            setattr(module, name, Float32Gradient(child, dtype))
        else:
            _arrange(child, dtype)


def _root_mean_squares() -> tuple[type[nn.Module], ...]:
    from timm.layers import RmsNorm, RmsNorm2d

    return nn.RMSNorm, RmsNorm, RmsNorm2d


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(cast(parameter), requires_grad=False)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = cast(buffer)


def _is_strided_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.stride) > 1


def token_width(tower: nn.Module) -> int:
    """Width of the tokens of an open_clip transformer tower that pools them plainly; 0 for any other tower."""
    parts = all(hasattr(tower, name) for name in ("transformer", "ln_post", "proj", "attn_pool"))
    plain: Any = tower
    return int(plain.transformer.width) if parts and plain.attn_pool is None and plain.proj is not None else 0


@contextmanager
def tokens_of(tower: nn.Module, prompts: Tensor | None) -> Iterator[list[Tensor]]:
    """While it lasts, ``prompts`` (P, W) stand behind the tokens of every image, seen by all and pooled by none.

    Each call of the tower adds its last tokens to the list: (B, 1 + L, W), the class token first, before the last
    normalisation. For towers that ``token_width`` knows.
    """
    seen: list[Tensor] = []

    def append(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, *rest = inputs
        if prompts is None:
            return inputs
        behind = prompts.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens, behind], dim=1), *rest

    def cut(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        tokens = output if prompts is None else output[:, : output.shape[1] - len(prompts)]
        seen.append(tokens)
        return tokens

    transformer: Any = tower.transformer
    hooks = transformer.register_forward_pre_hook(append), transformer.register_forward_hook(cut)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Float32Gradient(nn.Module):
    """A convolution that runs in float32 while gradients are recorded, and in ``dtype`` otherwise.

    oneDNN has no fast gradient in bf16 for a depthwise convolution with a stride: it took ten times as long as in
    float32, and half of a step of EfficientNet-Lite0.
    """

    def __init__(self, convolution: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.exact = convolution
        self.fast = copy.copy(convolution)
        self.fast._parameters = dict(convolution._parameters)
        _cast_own(self.fast, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            found: Tensor = self.fast(pixels)
            return found
        exact: Tensor = self.exact(pixels.float())
        return exact.to(pixels.dtype)


class SelfAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the same weights and results, for a sequence that attends to itself.

    The original transposes its input before the projection; with gradients or under autocast, PyTorch then multiplies
    image by image with copies of the weights, which costs more than the product itself.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        plain = not arguments and options.get("need_weights", True) is False
        masked = any(options.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        own = query is key is value and query.ndim == 3 and self.bias_k is None and not self.add_zero_attn
        if not (plain and own and self.batch_first and not masked):
            return super().forward(query, key, value, *arguments, **options)
        batch, length, width = query.shape
        packed = linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = packed.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = attend(*heads.unbind()).transpose(1, 2).reshape(batch, length, width)
        return linear(mixed, self.out_proj.weight, self.out_proj.bias), None


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, heads, L, d) each -> (B, heads, L, d).

    On a CPU in bf16 the formula as written beats PyTorch's fused kernel, most of all with gradients.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return torch.softmax(scores, -1) @ value
    return scaled_dot_product_attention(query, key, value)
