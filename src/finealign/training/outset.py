"""What is found out about the images before the first step: who is a stranger, and what share each class has.

Both look at the features of all images as the start encodes them, and at the start's classifier. No label is read.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.config import Config
from finealign.method.base import SelfTrainingMethod
from finealign.method.class_prior import estimated_shares, even_or
from finealign.method.copies import copies
from finealign.method.strangers import fit, p_none
from finealign.training.features import ImageSource
from finealign.training.state import State

CHUNK = 1024  # images whose crops are in memory together
LEAST_BELONGING = 0.01  # so that a batch of strangers alone still has a mean prediction


@torch.no_grad()
def take_stock(state: State, source: ImageSource, config: Config) -> None:
    """Set how far each image belongs to the classes, and what share of the images each class is expected to have.

    ``training.strangers`` off lets all images belong. A share is estimated where ``method.class_prior`` is auto; near
    copies of one image count once for it, and strangers as little as they belong.
    """
    method = state.method
    if not isinstance(method, SelfTrainingMethod):
        return
    estimates = method.options.class_prior == "auto"
    if not estimates and config.training.strangers == "off":
        return
    weak, mean_crops = _features(source, len(state.labels), config)
    anchors = normalize(method.classifier().mean(1), dim=1).to(weak.device)
    if config.training.strangers == "auto":
        state.belonging = (
            (1 - p_none(fit(weak, mean_crops, anchors), weak, mean_crops)).clamp_min(LEAST_BELONGING).cpu()
        )
    if estimates:
        group = torch.from_numpy(copies(weak.float().cpu().numpy()))
        counts = state.belonging / torch.bincount(group)[group]
        shares = estimated_shares(weak, mean_crops, anchors, logit_scale=method.logit_scale, weights=counts)
        method.expect(even_or(shares, float(counts.sum())).to(method.class_prior))
    state.ranks.follow([state.belonging, *state.tensors().values()])  # rounding may have made the ranks differ


def _features(source: ImageSource, images: int, config: Config) -> tuple[Tensor, Tensor | None]:
    """The weak features of all images (n, D), and the mean of each image's crops (n, D); None if no crops are kept."""
    if config.views.refresh_epochs == 0 and config.training.encoder == "full":
        return source.whole_images(0), None
    parts = [source.label_features(chunk, 0) for chunk in torch.split(torch.arange(images), CHUNK)]
    weak = torch.cat([part.weak for part in parts])
    if not parts[0].crops.shape[1]:
        return weak, None
    return weak, torch.cat([part.crops.mean(1) for part in parts])
