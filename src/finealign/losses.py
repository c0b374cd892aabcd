"""The two terms of the loss: weighted cross-entropy and fairness. Pure tensor maths, in the inputs' dtype."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """mean_x omega(x) * CE(logits(x), y(x)): the mean is over images, not over weights.

    logits (B, C), labels (B,) int64, weights (B,) in [0, 1] -> scalar, at least 0. Step 7 of METHOD [R].
    """
    return (weights * cross_entropy(logits, labels, reduction="none")).mean()


def fairness(mean_prediction: Tensor) -> Tensor:
    """-(1/C) sum_c log pbar_c: least, and equal to log C, when every class is predicted equally often.

    mean_prediction (C,) summing to 1 -> scalar. A class with no mass is taken as the smallest float, so the term stays
    finite. Step 7 of METHOD [R]; the term itself is used by MUST (arXiv 2206.02967) and DPA.
    """
    return -mean_prediction.clamp_min(torch.finfo(mean_prediction.dtype).tiny).log().mean()


def running_mean(previous: Tensor, current: Tensor, *, momentum: float) -> Tensor:
    """The running mean prediction as a value, with the gradient of the current batch's mean.

    previous (C,), current (C,) -> (C,) = m * previous + (1 - m) * current; d/d current is 1, not 1 - m, so that the
    fairness term pulls as hard as with the batch mean while it judges balance over more than a batch. [R]
    """
    value = momentum * previous.detach() + (1 - momentum) * current.detach()
    return value + (current - current.detach())
