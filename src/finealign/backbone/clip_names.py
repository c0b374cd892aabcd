"""The names that transformers' CLIPModel has for the weights of open_clip's CLIP, in both directions."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from finealign.errors import ModelError

PLACES = {  # transformers' name of each weight outside the blocks
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled like this in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TURNED = ("visual.proj", "text_projection")  # to be transposed: open_clip multiplies by them from the right
PARTS = {  # transformers' name of each layer of a block
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights of a CLIP under transformers' names.

    Raises ModelError for a weight that transformers' CLIP does not have.
    """
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        tower, blocks, rest = name.partition("transformer.resblocks.")
        number, _, part = rest.partition(".")
        layer, _, kind = part.rpartition(".")
        prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
        if part.startswith("attn.in_proj_"):
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                weights[f"{prefix}.self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = piece
        elif blocks and layer in PARTS:
            weights[f"{prefix}.{PARTS[layer]}.{kind}"] = value
        elif name in PLACES:
            weights[PLACES[name]] = value.T if name in TURNED else value
        elif name == "text_projection.weight":  # a layer where others have a matrix
            weights[name] = value
        else:
            raise ModelError(f"transformers' CLIP has no place for the weight {name!r}. Wanted: --format open_clip.")
    weights["logit_scale"] = weights["logit_scale"].reshape(())
    return weights


def open_clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' CLIPModel under open_clip's names; one without a place there keeps its name."""
    names = {theirs: ours for ours, theirs in PLACES.items()}
    layers = {theirs: ours for ours, theirs in PARTS.items()}
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        block = _BLOCK.fullmatch(name)
        if name in names:
            state[names[name]] = value.T if names[name] in TURNED else value
        elif block is None:
            state[name] = value
        else:
            tower, number, layer, kind = block.groups()
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            pieces = [weights.get(f"{name.partition('self_attn.')[0]}self_attn.{one}_proj.{kind}") for one in "qkv"]
            if layer in layers:
                state[f"{prefix}.{layers[layer]}.{kind}"] = value
            elif re.fullmatch(r"self_attn\.[qkv]_proj", layer):
                if layer == "self_attn.q_proj":
                    state[f"{prefix}.attn.in_proj_{kind}"] = torch.cat([one for one in pieces if one is not None])
            else:
                state[name] = value
    return state
