"""Working copies of image towers that run faster on the processor in use.

A working copy computes the same as the tower it was made from, up to rounding. The two share their normalisation
parameters, in float32, so training through the copy trains the model that is saved. The weights that are never trained
are cast once, when the copy is made, and not at every call.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, whose scale and shift are trained: step 8 of the method."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, *_root_mean_squares()))


def is_convolutional(tower: nn.Module) -> bool:
    """Whether a tower is convolutional, which is recognised by its BatchNorm layers."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules())


def working_copy(tower: nn.Module, *, dtype: torch.dtype, on: str = "cpu") -> nn.Module:
    """A copy of ``tower`` that shares its normalisation parameters and holds its other weights in ``dtype``.

    In float32 all weights are shared and none is copied. Gradients through the copy reach the shared parameters. The
    copy takes images in ``dtype``, and is arranged for devices of the type ``on``.
    """
    # ``deepcopy`` does not copy the objects that its memo already holds, so the copy shares all parameters.
    shared: dict[int, Any] = {id(parameter): parameter for parameter in tower.parameters()}
    copied = copy.deepcopy(tower, shared)
    _arrange(copied, dtype, on)
    return copied


def _arrange(module: nn.Module, dtype: torch.dtype, on: str) -> None:
    """Cast and replace the layers of a working copy, in place and recursively."""
    # Without ``_qkv_same_embed_dim`` there is no ``in_proj_weight``, which SelfAttention needs.
    if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim:
        module.__class__ = SelfAttention
    if dtype != torch.float32:
        # timm's switch for the fused kernel; see ``attend``.
        if on == "cpu" and getattr(module, "fused_attn", False) is True:
            setattr(module, "fused_attn", False)  # noqa: B010, nn.Module declares no such attribute
        if isinstance(module, _needing_float32(on)):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            module.register_forward_hook(lambda _, __, output: output.to(dtype))
        if not is_normalisation(module):
            _cast_own(module, dtype)
    for name, child in module.named_children():
        if on == "cpu" and dtype != torch.float32 and _is_strided_depthwise(child):
            setattr(module, name, Float32Gradient(child, dtype))
        else:
            _arrange(child, dtype, on)


def _needing_float32(on: str) -> tuple[type[nn.Module], ...]:
    """The normalisation layers that cannot apply a float32 scale to values of fewer bits, on devices of this type.

    BatchNorm can everywhere, and on a CPU all but the RMS layers can.
    """
    return _root_mean_squares() if on == "cpu" else (nn.LayerNorm, nn.GroupNorm, *_root_mean_squares())


def _root_mean_squares() -> tuple[type[nn.Module], ...]:
    """The RMS normalisation layers of torch and timm."""
    from timm.layers import RmsNorm, RmsNorm2d

    return nn.RMSNorm, RmsNorm, RmsNorm2d


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the module's own parameters and buffers to ``dtype``, not those of its children."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(cast(parameter), requires_grad=False)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = cast(buffer)


def _is_strided_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.stride) > 1


def token_width(tower: nn.Module) -> int:
    """Width of the tokens of an open_clip transformer tower without attention pooling; 0 for any other tower."""
    complete = all(hasattr(tower, name) for name in ("transformer", "ln_post", "proj", "attn_pool"))
    visual: Any = tower  # nn.Module declares none of these attributes
    return int(visual.transformer.width) if complete and visual.attn_pool is None and visual.proj is not None else 0


@contextmanager
def tokens_of(tower: nn.Module, prompts: Tensor | None) -> Iterator[list[Tensor]]:
    """A context in which ``prompts`` (P, W) are appended to the tokens of every image, and the tokens are recorded.

    All tokens attend to the prompts; the prompts are removed again after the last block, so they are not pooled. Each
    call of the tower adds its output tokens to the list that the context yields: (B, 1 + L, W), the class token first,
    before the last normalisation. Only for towers whose ``token_width`` is not 0.
    """
    recorded: list[Tensor] = []

    def append(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, *rest = inputs
        if prompts is None:
            return inputs
        appended = prompts.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens, appended], dim=1), *rest

    def cut(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        tokens = output if prompts is None else output[:, : output.shape[1] - len(prompts)]
        recorded.append(tokens)
        return tokens

    transformer: Any = tower.transformer
    hooks = transformer.register_forward_pre_hook(append), transformer.register_forward_hook(cut)
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


class Float32Gradient(nn.Module):
    """A convolution that runs in float32 while gradients are enabled, and in ``dtype`` otherwise.

    oneDNN has no fast bf16 gradient for a depthwise convolution with a stride: it took ten times as long as in
    float32, which was half the time of a training step of EfficientNet-Lite0.
    """

    def __init__(self, convolution: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.exact = convolution
        # ``copy.copy`` shares ``_parameters`` with the original, which must keep its float32 weights.
        self.fast = copy.copy(convolution)
        self.fast._parameters = dict(convolution._parameters)
        _cast_own(self.fast, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Convolve ``pixels`` (B, channels, height, width) in ``dtype``. Returns the same dtype."""
        if not torch.is_grad_enabled():
            fast: Tensor = self.fast(pixels)
            return fast
        exact: Tensor = self.exact(pixels.float())
        return exact.to(pixels.dtype)


class SelfAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the same weights and results, but faster where a sequence attends to itself.

    The original transposes its input before the projection. With gradients or under autocast, PyTorch then multiplies
    image by image with copies of the weights, which costs more than the product itself.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        """As ``nn.MultiheadAttention.forward``: returns the output, and the attention weights or None.

        The fast path is taken if query, key and value are the same (B, L, W) tensor, batch first, without masks, and
        ``need_weights`` is False. All other calls go to the original.
        """
        only_output = not arguments and options.get("need_weights", True) is False
        masked = any(options.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        to_itself = query is key is value and query.ndim == 3 and self.bias_k is None and not self.add_zero_attn
        if not (only_output and to_itself and self.batch_first and not masked):
            return super().forward(query, key, value, *arguments, **options)
        batch, length, width = query.shape
        packed = linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = packed.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = attend(*heads.unbind()).transpose(1, 2).reshape(batch, length, width)
        return linear(mixed, self.out_proj.weight, self.out_proj.bias), None


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, softmax(q k^T / sqrt(d)) v: query, key and value (B, heads, L, d) each -> (B, heads, L, d).

    On a CPU in bf16 the formula is computed as written: that is faster than PyTorch's fused kernel, above all with
    gradients.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return torch.softmax(scores, -1) @ value
    return scaled_dot_product_attention(query, key, value)
