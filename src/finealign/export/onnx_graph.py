"""An ONNX graph from uint8 pixels to scores and probabilities, as FineAlign computes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from finealign.backbone import Backbone
from finealign.errors import ModelError
from finealign.export.wording import one_line
from finealign.methods import Method
from finealign.towers import working_copy
from finealign.types import ImageFeatures, Score

OUTPUTS = ["scores", "probabilities"]


class Graph(nn.Module):
    """What is written: the image tower in float32, its normalisation of pixels, and the method's score."""

    mean: Tensor
    std: Tensor
    anchors: Tensor | None

    def __init__(self, backbone: Backbone, method: Method, kind: Score) -> None:
        super().__init__()
        self.visual = working_copy(backbone.model.visual, dtype=torch.float32)
        self.method = method
        self.kind = kind
        mean, std = torch.tensor([backbone.preprocess["mean"], backbone.preprocess["std"]])[:, :, None, None]
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        anchors = None
        if type(method).scores == ("las",):  # linear in the crops, but counts its classes as it goes: no graph can
            axes = torch.eye(backbone.config["embed_dim"])
            anchors = method.score(ImageFeatures(axes, axes[:, None]), kind).T.contiguous()  # (C, D)
        self.register_buffer("anchors", anchors)

    @property
    def weight_bytes(self) -> int:
        return sum(value.nbytes for value in [*self.parameters(), *self.buffers()])

    def forward(self, image: Tensor, crops: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S), crops (B, N, 3, S, S), both uint8 -> (B, C) scores, (B, C) probabilities."""
        whole = self._embed(image)
        parts = whole[:, None][:, :0]
        if crops is not None:
            parts = self._embed(crops.flatten(0, 1)).reshape(image.shape[0], crops.shape[1], whole.shape[1])
        features = ImageFeatures(whole, parts)
        if self.anchors is None:
            score = self.method.score(features, self.kind)
        else:
            score = torch.einsum("bn,bnd,cd->bc", self.method.crop_weights(features), parts, self.anchors)
        return score, self.method.probabilities(score)

    def _embed(self, images: Tensor) -> Tensor:
        found = self.visual(images.float().div(255).sub(self.mean).div(self.std))
        return normalize(found[0] if isinstance(found, tuple) else found, dim=-1)  # CoCa's tower gives its tokens too


def input_shapes(batch: int, size: int, crops: int) -> dict[str, tuple[int, ...]]:
    """The inputs by name; no crops, no such input."""
    shapes: dict[str, tuple[int, ...]] = {"image": (batch, 3, size, size)}
    return shapes | ({"crops": (batch, crops, 3, size, size)} if crops else {})


def write_graph(graph: Graph, path: Path, *, size: int, crops: int, beside: bool) -> None:
    """Write the graph for batches of any size, its weights ``beside`` it or inside. Raises ModelError."""
    # A batch of 1 would be taken for the only one there is, and 2 is the least that is not.
    given = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in input_shapes(2, size, crops).items()}
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            torch.onnx.export(
                graph,
                tuple(given.values()),
                path,
                dynamo=True,
                input_names=list(given),
                output_names=OUTPUTS,
                dynamic_shapes=tuple({0: batch} for _ in given),
                external_data=beside,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever it likes; the user gets one sentence
        first: BaseException = error
        while first.__cause__:
            first = first.__cause__
        raise ModelError(
            f"This model cannot be written as an ONNX graph: {one_line(str(first))} Wanted: --format open_clip."
        ) from error


def _stable_sort() -> Callable[..., Any]:
    """ONNX's words for torch's stable sort, which the exporter has none for: among equals TopK gives the first."""
    from onnxscript import opset18 as op

    def stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        length: Any = op.Constant(value_ints=[self.shape[dim]])
        return op.TopK(self, length, axis=dim, largest=int(descending))

    return stable_sort
