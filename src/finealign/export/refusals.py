"""Refusal of models that cannot be exported, before anything is written."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

from finealign.backbone.model import OpenClipBackbone
from finealign.classifier import FineAlign
from finealign.errors import ConfigError
from finealign.export.checks import Format, open_clip_backbone
from finealign.method.base import Method
from finealign.types import Score

NEEDED: Mapping[Format, Sequence[str]] = {  # optional packages
    "open_clip": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}


def refuse_unfit(model: FineAlign, format: Format, kind: Score) -> None:
    """Raises ConfigError when a model cannot be exported in a format.

    The reason may be a method, score or architecture that the format cannot hold, or a package that is not installed.
    """
    backbone = open_clip_backbone(model)
    _refuse_method(model, format)
    _refuse_score(model, format, kind)
    _refuse_missing(format)
    if format == "hf":
        refuse_other_shape(backbone)


def _refuse_method(model: FineAlign, format: Format) -> None:
    """Raises ConfigError for a method whose scores the format cannot compute."""
    method, name = model.method_, model.model_.name
    if gaze := method.gaze:
        what = "salient patches" if gaze.salient else "prompts it has learned"
        raise ConfigError(
            f"The method {name!r} sees images with {what}, which no other library would look with, so its scores would "
            "be lost. Wanted: a model of another method, as fair; or predict with FineAlign."
        )
    if method.surveys:
        raise ConfigError(
            f"The method {name!r} scores an image by all those it was fitted to, which no export holds. Wanted: a "
            "model of another method, as fair; or predict with FineAlign."
        )
    if format != "onnx" and type(method).score is not Method.score:
        raise ConfigError(
            f"The method {name!r} scores by more than anchors, which is all that a {format} folder holds. Wanted: "
            "--format onnx."
        )


def _refuse_score(model: FineAlign, format: Format, kind: Score) -> None:
    """Raises ConfigError for a score that the method or the format does not have."""
    valid = model.method_.scores
    name = model.model_.name
    if kind not in valid:
        advice = f"Valid: {', '.join(valid)}." if format == "onnx" else "Wanted: --format onnx, which holds its score."
        raise ConfigError(f"The method {name!r} has no score {kind!r}. {advice}")
    if format != "onnx" and kind != "global":
        raise ConfigError(
            f"The score {kind!r} looks at crops, and a {format} folder scores whole images. Wanted: --score global, or "
            "--format onnx."
        )


def _refuse_missing(format: Format) -> None:
    missing = [name for name in NEEDED[format] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"The format {format} needs {', '.join(missing)}, which is not installed: pip install 'finealign[export]'."
        )


def refuse_other_shape(backbone: OpenClipBackbone) -> None:
    """Raises ConfigError when transformers' CLIPModel does not compute what the backbone does.

    The message names the first difference.
    """
    difference = next(differences(backbone), None)
    if difference:
        raise ConfigError(
            f"This model is no CLIP as transformers builds it: {difference}. Wanted: --format open_clip or --format "
            "onnx, which hold it as it is."
        )


def differences(backbone: OpenClipBackbone) -> Iterator[str]:
    """How a backbone differs from transformers' CLIPModel, each difference as a clause.

    Stops early where a difference leaves nothing else to compare.
    """
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
    """transformers' name of a block's activation; None if transformers does not have it."""
    kind = block.mlp.gelu
    if type(kind).__name__ == "QuickGELU":
        return "quick_gelu"
    if not isinstance(kind, nn.GELU):
        return None
    return "gelu" if kind.approximate == "none" else "gelu_pytorch_tanh"
