"""Build one of open_clip's models from its model_cfg, without weights."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from finealign.backbone.text_tower import is_transformers


def build_model(config: Mapping[str, Any]) -> Any:
    """The CLIP, CustomTextCLIP or CoCa that open_clip makes of ``config``, with random weights."""
    from open_clip import CLIP, CoCa, CustomTextCLIP

    options = copy.deepcopy(dict(config))
    custom = options.pop("custom_text", False) or is_transformers(config)
    if is_transformers(config):
        options["text_cfg"]["hf_model_pretrained"] = False
    if not custom:
        return CLIP(**options)
    return (CoCa if "multimodal_cfg" in options else CustomTextCLIP)(**options)


def preprocessing_for(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocess_cfg for a model: what is given, and open_clip's defaults for the rest. The size is the model's."""
    from open_clip.transform import PreprocessCfg

    return {**asdict(PreprocessCfg()), **given, "size": model.visual.image_size}
