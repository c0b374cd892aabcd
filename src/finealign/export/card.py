"""The model card of an export: that of the model, but for how it is used."""

from collections.abc import Mapping

from finealign.classifier import FineAlign
from finealign.export.record import Format
from finealign.model_card import model_card
from finealign.model_folder import SavedModel

USE = """\
`python usage.py IMAGE...` prints the class of each image. `usage.classify(paths)` gives the scores and probabilities of
all classes, in the order of `classes.json`. It needs {needs}, and no finealign.

{more}

`parity.json` has how closely the scores agree with finealign's.
"""
NEEDS: Mapping[Format, str] = {
    "open_clip": "open_clip_torch",
    "hf": "transformers, torch and Pillow",
    "onnx": "onnxruntime, numpy and Pillow",
}
MORE: Mapping[Format, str] = {
    "open_clip": "The folder is an open_clip model: "
    '`open_clip.create_model_and_transforms("local-dir:PATH-OF-THIS-FOLDER")`. The class vectors are in '
    "`anchors.safetensors`.",
    "hf": 'The folder is a CLIP of transformers: `CLIPModel.from_pretrained("PATH-OF-THIS-FOLDER")`. The class vectors '
    "are in `anchors.safetensors`.",
    "onnx": "`model.onnx` takes uint8 pixels as `usage.py` prepares them, and knows its classes: it has no text tower.",
}
LIBRARIES: Mapping[Format, str] = {"open_clip": "open_clip", "hf": "transformers", "onnx": "onnx"}


def export_card(model: FineAlign, format: Format) -> str:
    """``README.md`` of a fitted model's export."""
    saved = SavedModel(
        model.config_,
        model.texts_,
        model.text_features_,
        model.backbone_,
        model.method_,
        model.start_norms_,
    )
    return model_card(
        saved,
        library=LIBRARIES[format],
        task="image-classification" if format == "onnx" else "zero-shot-image-classification",
        use=USE.format(needs=NEEDS[format], more=MORE[format]),
    )
