"""What cannot be exported, said before anything is written."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from finealign.classifier import FineAlign
from finealign.errors import ConfigError
from finealign.export.clip_shape import refuse_other_shape
from finealign.export.record import Format
from finealign.methods import Method
from finealign.training import method_gaze
from finealign.types import Score

NEEDED: Mapping[Format, Sequence[str]] = {
    "open_clip": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}


def refuse_unfit(model: FineAlign, format: Format, kind: Score) -> None:
    """Raises ConfigError for a method, score or architecture that the format cannot hold, or a missing library."""
    _refuse_method(model, format)
    _refuse_score(model, format, kind)
    _refuse_missing(format)
    if format == "hf":
        refuse_other_shape(model.backbone_)


def _refuse_method(model: FineAlign, format: Format) -> None:
    """Raises ConfigError for methods whose scores are more than a tower and anchors."""
    method, name = model.method_, model.config_.method.name
    if gaze := method_gaze(method):
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
    valid = type(model.method_).scores
    name = model.config_.method.name
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
