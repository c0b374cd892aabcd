"""What transformers' CLIPModel computes, and what sets an open_clip model apart from it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from finealign.backbone import Backbone
from finealign.errors import ConfigError


def refuse_other_shape(backbone: Backbone) -> None:
    """Raises ConfigError for what transformers' CLIPModel does not compute, naming it."""
    found = next(differences(backbone), None)
    if found:
        raise ConfigError(
            f"This model is no CLIP as transformers builds it: {found}. Wanted: --format open_clip or --format onnx, "
            "which hold it as it is."
        )


def differences(backbone: Backbone) -> Iterator[str]:
    """What sets a model apart from transformers' CLIPModel; stops where the rest could not be asked."""
    model, config, preprocess = backbone.model, backbone.config, backbone.preprocess
    visual = model.visual
    vision, text = config["vision_cfg"], config["text_cfg"]
    if type(visual).__name__ != "VisionTransformer":
        kind = vision.get("timm_model_name") or type(visual).__name__
        yield f"its image tower is {kind}, not open_clip's VisionTransformer"
        return
    if type(model).__name__ != "CLIP":
        yield f"it is a {type(model).__name__}, with a text tower of another kind"
        return
    plain_text = isinstance(model.text_projection, nn.Parameter) or (
        isinstance(model.text_projection, nn.Linear) and model.text_projection.bias is None
    )
    blocks = [*visual.transformer.resblocks, *model.transformer.resblocks]
    properties: list[tuple[bool, str]] = [
        (visual.attn_pool is not None, "its image tower pools by attention (attentional_pool)"),
        (visual.pool_type != "tok", f"its image tower pools by {visual.pool_type!r}, not by the class token"),
        (isinstance(visual.ln_pre, nn.Identity), "its image tower has no first normalisation (no_ln_pre)"),
        (vision.get("pos_embed_type", "learnable") != "learnable", "its positions are not learned (pos_embed_type)"),
        (visual.conv1.bias is not None or visual.proj is None, "its image tower has another stem or no projection"),
        (len(set(visual.patch_size)) > 1, "its patches are not square"),
        (any(type(block).__name__ != "ResidualAttentionBlock" for block in blocks), "its blocks are custom ones"),
        (any(not isinstance(block.ls_1, nn.Identity) for block in blocks), "its blocks scale (ls_init_value)"),
        (len({activation(block) for block in blocks}) > 1, "its towers have different activations"),
        (activation(blocks[0]) is None, f"its activation is a {type(blocks[0].mlp.gelu).__name__}"),
        (model.attn_mask is None, "its text tower has no causal mask (no_causal_mask)"),
        (bool(text.get("embed_cls")), "its text tower has a class token (embed_cls)"),
        (model.text_pool_type not in ("argmax", "eos"), f"its text tower pools by {model.text_pool_type!r}"),
        (not plain_text, "its text projection is none, or has a bias (proj_bias)"),
        (model.logit_bias is not None, "its logits have a bias (init_logit_bias)"),
        (type(backbone.tokenizer).__name__ != "SimpleTokenizer", "its tokenizer is not CLIP's"),
        (preprocess.get("resize_mode", "shortest") == "longest", "its images are padded (resize_mode longest)"),
    ]
    yield from (sentence for differs, sentence in properties if differs)
    tokenizer = backbone.tokenizer
    if tokenizer.reduction_fn is not None or len(tokenizer.encoder) != text.get("vocab_size", 49408):
        yield "its tokenizer has other tokens than CLIP's"


def activation(block: Any) -> str | None:
    """transformers' name for a block's activation; None where it has none."""
    kind = block.mlp.gelu
    if type(kind).__name__ == "QuickGELU":
        return "quick_gelu"
    if not isinstance(kind, nn.GELU):
        return None
    return "gelu" if kind.approximate == "none" else "gelu_pytorch_tanh"
