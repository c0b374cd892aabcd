"""Measuring predictions against ground truth. This is the only package that reads true labels.

n is the number of images, C of classes. Accuracies, shares and errors are fractions in [0, 1], Brier scores lie in
[0, 2]; a confusion matrix counts images. ``metrics.py`` has pure functions of numpy arrays. They raise ``ValueError``
for arrays that do not fit together (a wrong shape, a label outside [0, C), NaN, no image at all): that is a programming
error of the caller, never a mistake of the user.
"""

from finealign.evaluate.summary import evaluate_predictions
from finealign.evaluate.truth import read_truth

__all__ = ["evaluate_predictions", "read_truth"]
