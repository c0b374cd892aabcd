"""The two terms of the loss, weighted cross-entropy and fairness: pure tensor functions in the dtype of their inputs.

Step numbers are those of docs/method.md.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Compute mean_x omega(x) * CE(logits(x), y(x)), divided by the number of images and not by the sum of weights.

    logits (B, C), labels (B,) int64, weights (B,) in [0, 1] -> scalar, at least 0. Step 7 of the method [R].
    """
    return (weights * cross_entropy(logits, labels, reduction="none")).mean()


def fairness(mean_prediction: Tensor, class_prior: Tensor) -> Tensor:
    """Compute -sum_c pi_c log pbar_c. Its minimum is reached if class c is predicted for the share pi_c of the images.

    mean_prediction pbar (C,) and class_prior pi (C,), both summing to 1 -> scalar. A probability of 0 is replaced by
    the smallest normal float, so the term stays finite. Step 7 of the method [R]. With the even prior, pi_c = 1/C, it
    is the term of MUST (arXiv 2206.02967) and DPA; the use of other priors is ours.
    """
    return -(class_prior * mean_prediction.clamp_min(torch.finfo(mean_prediction.dtype).tiny).log()).sum()


def mean_over(predictions: Tensor, belonging: Tensor | None) -> Tensor:
    """Compute the mean prediction of a batch, in which each image counts as far as it belongs to the classes.

    predictions (B, C), belonging (B,) in (0, 1] or None for 1 -> (C,).
    """
    if belonging is None:
        return predictions.mean(0)
    return (belonging[:, None] * predictions).sum(0) / belonging.sum()


def running_mean(previous: Tensor, current: Tensor, *, momentum: float) -> Tensor:
    """Update the running mean prediction. The result has the gradient of the current batch's mean.

    previous (C,), current (C,) -> (C,) = m * previous + (1 - m) * current, where m is ``momentum``. The derivative with
    respect to ``current`` is 1 and not 1 - m: the fairness term then judges the balance over more than one batch, with
    a gradient as large as that of the batch mean. [R]
    """
    value = momentum * previous.detach() + (1 - momentum) * current.detach()
    return value + (current - current.detach())
