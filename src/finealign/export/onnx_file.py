"""An ONNX file, run by onnxruntime on batches of several sizes and by its usage.py on files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finealign.classifier import FineAlign
from finealign.errors import ModelError
from finealign.export.companions import resampling, write_classes, write_usage
from finealign.export.layout import GRAPH
from finealign.export.onnx_graph import OUTPUTS, Graph, input_shapes, write_graph
from finealign.export.parity import largest, own_scores, run_usage
from finealign.export.pictures import draw_batch, write_pictures
from finealign.export.record import Checked, Measure
from finealign.export.wording import one_line
from finealign.types import ImageFeatures, Score
from finealign.views import CROP, PREDICTION_EPOCH

BATCHES = 1, 3, 8  # that the graph is run on
ONE_FILE = 1_900_000_000  # bytes of weights; protobuf holds no file above 2 GiB
CLOSE = 1e-3  # what is promised of the same pixels
ROUNDED = 0.01  # of scores of crops, which Pillow rounds to other levels than torch: 1 of 255 here and there


def write_onnx(saved: FineAlign, kind: Score, folder: Path, aside: Path) -> Checked:
    """Raises ModelError where torch cannot write the graph or onnxruntime cannot open it."""
    backbone = saved.backbone_
    count = saved.config_.views.crops if kind != "global" else 0
    graph = Graph(backbone, saved.method_, kind).eval()
    beside = graph.weight_bytes > ONE_FILE
    write_graph(graph, folder / GRAPH, size=backbone.input_size, crops=count, beside=beside)
    scores, probabilities = _compare(_open(folder / GRAPH), saved, kind, count)
    write_classes(saved, kind, folder)
    write_usage("onnx", folder, **_geometry(saved, count))
    images = write_pictures(backbone.input_size, aside)
    used = largest(run_usage(folder, aside, images)["scores"], own_scores(saved, images, kind))
    return Checked(
        {
            "scores": Measure(scores, CLOSE),
            "probabilities": Measure(probabilities, CLOSE),
            "scores by usage.py": Measure(used, ROUNDED if count else CLOSE),
        },
        ("The weights lie beside the graph in a file of their own, as they are above 2 GB.",) if beside else (),
    )


def _open(path: Path) -> Any:
    """onnxruntime's session. Raises ModelError."""
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        onnx.checker.check_model(str(path), full_check=True)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each has many kinds of its own
        raise ModelError(f"The ONNX graph that was written does not open: {one_line(str(error))}") from error


def _compare(session: Any, saved: FineAlign, kind: Score, crops: int) -> tuple[float, float]:
    """The largest differences of scores and of probabilities on the same pixels."""
    backbone, method = saved.backbone_, saved.method_
    generator = np.random.default_rng(0)
    apart = []
    for batch in BATCHES:
        shapes = input_shapes(batch, backbone.input_size, crops)
        given = {name: draw_batch(generator, shape) for name, shape in shapes.items()}
        whole = backbone.embed(given["image"])
        parts = backbone.embed(given["crops"].flatten(0, 1)) if crops else whole[:0]
        score = method.score(ImageFeatures(whole, parts.reshape(batch, crops, whole.shape[1])), kind)
        found = session.run(OUTPUTS, {name: value.numpy() for name, value in given.items()})
        wanted = score, method.probabilities(score)
        apart.append([largest(one, other.numpy()) for one, other in zip(found, wanted, strict=True)])
    scores, probabilities = np.max(apart, axis=0)  # no number if one is none
    return float(scores), float(probabilities)


def _geometry(saved: FineAlign, crops: int) -> dict[str, Any]:
    """What usage.py has to know to show the graph what FineAlign shows the model."""
    preprocess, views = saved.backbone_.preprocess, saved.config_.views
    fill = preprocess.get("fill_color", 0)
    return {
        "size": saved.backbone_.input_size,
        "resize_mode": preprocess.get("resize_mode") or "shortest",
        "resampling": resampling(preprocess),
        "fill": tuple(fill) if isinstance(fill, Sequence) else (fill,) * 3,
        "crops": crops,
        "low": views.crop_low,
        "high": views.crop_high,
        "seed": saved.config_.seed,
        "epoch": PREDICTION_EPOCH,
        "first": CROP,
    }
