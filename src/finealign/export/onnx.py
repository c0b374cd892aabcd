"""ONNX export: a graph from uint8 pixels to scores, checked by onnxruntime at several batch sizes and by usage.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from finealign.backbone.model import OpenClipBackbone
from finealign.backbone.towers import working_copy
from finealign.classifier import FineAlign
from finealign.errors import ModelError, sentence
from finealign.export.checks import (
    Checked,
    Measure,
    draw_batch,
    largest,
    open_clip_backbone,
    own_scores,
    run_usage,
    write_pictures,
)
from finealign.export.companions import GRAPH, resampling, write_classes, write_usage
from finealign.images.views import CROP, PREDICTION_EPOCH
from finealign.method.base import Method
from finealign.types import ImageFeatures, Score

BATCHES = 1, 3, 8  # batch sizes that the graph is checked with
ONE_FILE = 1_900_000_000  # bytes of weights that one file holds; protobuf allows no file above 2 GiB
CLOSE = 1e-3  # the largest difference promised for the same pixels
ROUNDED = 0.01  # the same for scores of crops, some of whose pixels Pillow and torch round differently, by 1 of 255


def write_onnx(saved: FineAlign, kind: Score, folder: Path, aside: Path) -> Checked:
    """Write the model as an ONNX graph with classes and ``usage.py`` into ``folder``, and check it.

    ``aside`` is a folder for temporary files. Raises ModelError when torch cannot write the graph, when onnxruntime
    cannot open it, or when ``usage.py`` fails.
    """
    backbone = open_clip_backbone(saved)
    crops = saved.model_.inference.crops if kind != "global" else 0
    model = saved.model_
    graph = Graph(backbone, saved.method_, kind, temperature=model.temperature(kind), offsets=model.offsets()).eval()
    beside = graph.weight_bytes > ONE_FILE
    write_graph(graph, folder / GRAPH, size=backbone.input_size, crops=crops, beside=beside)
    scores, probabilities = _compare(_open(folder / GRAPH), saved, kind, crops)
    write_classes(saved, kind, folder)
    write_usage(saved, "onnx", folder, **_geometry(saved, crops))
    images = write_pictures(backbone.input_size, aside)
    usage_difference = largest(run_usage(folder, aside, images)["scores"], own_scores(saved, images, kind))
    return Checked(
        {
            "scores": Measure(scores, CLOSE),
            "probabilities": Measure(probabilities, CLOSE),
            "scores by usage.py": Measure(usage_difference, ROUNDED if crops else CLOSE),
        },
        ("The weights lie beside the graph in a file of their own, as they are above 2 GB.",) if beside else (),
    )


def _open(path: Path) -> Any:
    """An onnxruntime session. Raises ModelError when the graph is invalid or does not open."""
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        onnx.checker.check_model(str(path), full_check=True)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnx and onnxruntime raise many types
        raise ModelError(f"The ONNX graph that was written does not open: {sentence(error)}") from error


def _compare(session: Any, saved: FineAlign, kind: Score, crops: int) -> tuple[float, float]:
    """The largest differences from FineAlign's scores and probabilities on the same pixels."""
    backbone, model = open_clip_backbone(saved), saved.model_
    generator = np.random.default_rng(0)
    differences = []
    for batch in BATCHES:
        shapes = input_shapes(batch, backbone.input_size, crops)
        inputs = {name: draw_batch(generator, shape) for name, shape in shapes.items()}
        embeddings = backbone.embed(inputs["image"])
        crop_embeddings = backbone.embed(inputs["crops"].flatten(0, 1)) if crops else embeddings[:0]
        score = model.score(ImageFeatures(embeddings, crop_embeddings.reshape(batch, crops, embeddings.shape[1])), kind)
        outputs = session.run(OUTPUTS, {name: value.numpy() for name, value in inputs.items()})
        expected = score, model.probabilities(score, kind)
        differences.append([largest(output, value.numpy()) for output, value in zip(outputs, expected, strict=True)])
    scores, probabilities = np.max(differences, axis=0)  # NaN if any of them is NaN
    return float(scores), float(probabilities)


def _geometry(saved: FineAlign, crops: int) -> dict[str, Any]:
    """What usage.py needs to prepare images as FineAlign does."""
    preprocess, inference = open_clip_backbone(saved).preprocess, saved.model_.inference
    fill = preprocess.get("fill_color", 0)
    return {
        "size": saved.backbone_.input_size,
        "resize_mode": preprocess.get("resize_mode") or "shortest",
        "resampling": resampling(preprocess),
        "fill": tuple(fill) if isinstance(fill, Sequence) else (fill,) * 3,
        "crops": crops,
        "low": inference.crop_low,
        "high": inference.crop_high,
        "seed": inference.seed,
        "epoch": PREDICTION_EPOCH,
        "first": CROP,
    }


OUTPUTS = ["scores", "probabilities"]


class Graph(nn.Module):
    """The exported module: normalisation of pixels, the image tower in float32, and the model's score."""

    mean: Tensor
    std: Tensor
    anchors: Tensor | None
    offsets: Tensor | None

    def __init__(
        self,
        backbone: OpenClipBackbone,
        method: Method,
        kind: Score,
        *,
        temperature: float = 1.0,
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.visual = working_copy(backbone.model.visual, dtype=torch.float32)
        self.method = method
        self.kind = kind
        self.temperature = temperature
        mean, std = torch.tensor([backbone.preprocess["mean"], backbone.preprocess["std"]])[:, :, None, None]
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("offsets", offsets)
        anchors = None
        # WCA's score counts the classes while it runs, which cannot be exported. It is linear in the features of crops,
        # so its values on the unit vectors give one class vector for each class.
        if method.scores == ("las",):
            axes = torch.eye(backbone.config["embed_dim"])
            anchors = method.score(ImageFeatures(axes, axes[:, None]), kind).T.contiguous()  # (C, D)
        self.register_buffer("anchors", anchors)

    @property
    def weight_bytes(self) -> int:
        """The size of all parameters and buffers in bytes."""
        return sum(value.nbytes for value in [*self.parameters(), *self.buffers()])

    def forward(self, image: Tensor, crops: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score images (B, 3, S, S) and, where the score uses them, their crops (B, N, 3, S, S); both uint8.

        Returns scores (B, C) and probabilities (B, C).
        """
        embeddings = self._embed(image)
        crop_embeddings = embeddings[:, None][:, :0]
        if crops is not None:
            crop_embeddings = self._embed(crops.flatten(0, 1)).reshape(
                image.shape[0], crops.shape[1], embeddings.shape[1]
            )
        features = ImageFeatures(embeddings, crop_embeddings)
        if self.anchors is None:
            score = self.method.score(features, self.kind)
        else:
            score = torch.einsum("bn,bnd,cd->bc", self.method.crop_weights(features), crop_embeddings, self.anchors)
        if self.offsets is not None:
            score = score - self.offsets
        return score, self.method.probabilities(score / self.temperature)

    def _embed(self, images: Tensor) -> Tensor:
        output = self.visual(images.float().div(255).sub(self.mean).div(self.std))
        # CoCa's tower returns its tokens too.
        return normalize(output[0] if isinstance(output, tuple) else output, dim=-1)


def input_shapes(batch: int, size: int, crops: int) -> dict[str, tuple[int, ...]]:
    """The shape of each input by name. Without crops there is no input for them."""
    shapes: dict[str, tuple[int, ...]] = {"image": (batch, 3, size, size)}
    return shapes | ({"crops": (batch, crops, 3, size, size)} if crops else {})


def write_graph(graph: Graph, path: Path, *, size: int, crops: int, beside: bool) -> None:
    """Write the graph for batches of any size, for inputs of ``size`` pixels a side and ``crops`` crops an image.

    ``beside`` stores the weights in a file beside the graph rather than in it. Raises ModelError when torch cannot
    export the graph.
    """
    # torch.export takes a dimension of size 1 for a constant, so the example batch has 2 images.
    inputs = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in input_shapes(2, size, crops).items()}
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            torch.onnx.export(
                graph,
                tuple(inputs.values()),
                path,
                dynamo=True,
                input_names=list(inputs),
                output_names=OUTPUTS,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                external_data=beside,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types; the user gets the first cause as a sentence
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise ModelError(
            f"This model cannot be written as an ONNX graph: {sentence(str(cause))} Wanted: --format open_clip."
        ) from error


def _stable_sort() -> Callable[..., Any]:
    """A translation of torch's stable sort, which the exporter lacks: of equal values TopK puts the first one first."""
    from onnxscript import opset18 as op

    def stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        length: Any = op.Constant(value_ints=[self.shape[dim]])
        return op.TopK(self, length, axis=dim, largest=int(descending))

    return stable_sort
