"""open_clip's weights of a CLIP under transformers' names, with the configuration that fits them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finealign.backbone import Backbone
from finealign.errors import ModelError
from finealign.export.clip_shape import activation
from finealign.export.wording import one_line
from finealign.storage import save_tensors

PLACES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TURNED = ("visual.proj", "text_projection")  # open_clip multiplies by them from the right
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights of a CLIP by transformers' names. Raises ModelError for one that it has no place for."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        tower, blocks, rest = name.partition("transformer.resblocks.")
        number, _, part = rest.partition(".")
        layer, _, kind = part.rpartition(".")
        place = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
        if part.startswith("attn.in_proj_"):
            for one, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{place}.self_attn.{one}_proj.{part.removeprefix('attn.in_proj_')}"] = piece
        elif blocks and layer in PARTS:
            found[f"{place}.{PARTS[layer]}.{kind}"] = value
        elif name in PLACES:
            found[PLACES[name]] = value.T if name in TURNED else value
        else:
            raise ModelError(f"transformers' CLIP has no place for the weight {name!r}. Wanted: --format open_clip.")
    found["logit_scale"] = found["logit_scale"].reshape(())
    return found


def write_weights(backbone: Backbone, folder: Path) -> None:
    """``config.json`` and ``model.safetensors``. Raises ModelError for weights that do not fit."""
    from transformers import CLIPConfig, CLIPModel

    weights = clip_weights(backbone.model.state_dict())
    config = CLIPConfig(**_configuration(backbone), architectures=["CLIPModel"], dtype="float32")
    with torch.device("meta"):
        empty = CLIPModel(config)
    try:
        empty.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"The weights do not fit transformers' CLIP: {one_line(str(error))}") from error
    config.save_pretrained(folder)
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _configuration(backbone: Backbone) -> dict[str, Any]:
    model, tokenizer = backbone.model, backbone.tokenizer
    visual = model.visual

    def tower(transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
        first = transformer.resblocks[0]
        return {
            "hidden_size": transformer.width,
            "intermediate_size": first.mlp.c_fc.out_features,
            "num_hidden_layers": len(transformer.resblocks),
            "num_attention_heads": first.attn.num_heads,
            "hidden_act": activation(first),
            "layer_norm_eps": norm.eps,
            "projection_dim": backbone.config["embed_dim"],
        }

    image = {"image_size": backbone.input_size, "patch_size": visual.patch_size[0]}
    text = {
        "vocab_size": model.token_embedding.num_embeddings,
        "max_position_embeddings": len(model.positional_embedding),
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }
    return {
        "vision_config": tower(visual.transformer, visual.ln_post) | image,
        "text_config": tower(model.transformer, model.ln_final) | text,
        "projection_dim": backbone.config["embed_dim"],
    }
