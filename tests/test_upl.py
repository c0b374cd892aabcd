"""UPL: which images are learned from, and that the loss is a mean over these."""

from typing import Any

import pytest
import torch

from finealign.methods.upl import Upl
from finealign.testing import check_method
from finealign.types import TextFeatures
from test_methods import SCALE, Matrix, best, description_means, global_row, images, make, move, softmax, texts, unit
from test_peers import whole


def upl(known: TextFeatures | None = None, **options: Any) -> Upl:
    method = make("upl", known, **{"logit_scale": SCALE} | options)
    assert isinstance(method, Upl)
    return method


def opinions(weak: Matrix, known: TextFeatures) -> Matrix:
    return [softmax([SCALE * value for value in global_row(row, description_means(known))]) for row in weak]


@pytest.mark.parametrize("confident", [1, 3, 16])
@pytest.mark.parametrize(("classes", "n"), [(1, 6), (4, 30), (9, 3)])
def test_pseudo_label__counts_the_surest_of_each_label(classes: int, n: int, confident: int) -> None:
    known, weak = texts(classes), unit(n, 6, seed=4)
    method = upl(known, confident=confident)
    method.survey(weak)
    move(method)  # the texts that label are fixed
    rows = opinions(weak.tolist(), known)
    labels = [best(row) for row in rows]
    surest = set()
    for c in range(classes):
        of_class = sorted((i for i in range(n) if labels[i] == c), key=lambda i: -rows[i][c])
        surest.update(of_class[:confident])
    # In other batches than they were surveyed in.
    found = [method.pseudo_label(whole(part)) for part in torch.split(weak, 4)]
    assert torch.cat([one.labels for one in found]).tolist() == labels
    weights = torch.cat([one.weights for one in found]).tolist()
    assert weights.count(1.0) == len(surest)
    assert classes == 1 or weights == [float(i in surest) for i in range(n)]  # of one class all are as sure


def test_pseudo_label__counts_no_more_where_all_are_certain() -> None:
    weak = torch.eye(3, 6).repeat_interleave(10, 0)
    method = upl(TextFeatures(torch.eye(3, 6), torch.eye(3, 6), torch.arange(3)), confident=1, logit_scale=1000.0)
    method.survey(torch.nn.functional.normalize(weak + 0.1 * unit(30, 6, seed=4).float(), dim=1))
    assert method.chosen.sum() == 3


def test_loss__is_a_mean_over_the_images_that_are_learned_from() -> None:
    method, features = upl(confident=1, fairness="off"), images(b=20)
    method.survey(features.weak)
    pseudo, strong = method.pseudo_label(features), unit(20, 6, seed=5)
    counted = [i for i, weight in enumerate(pseudo.weights.tolist()) if weight]
    assert 0 < len(counted) < 20
    logits = SCALE * strong @ method.classifier().detach()[:, 0].T
    wanted = torch.nn.functional.cross_entropy(logits[counted], pseudo.labels[counted])
    torch.testing.assert_close(method.loss(strong, pseudo).total.detach(), wanted)


@pytest.mark.nightly
def test_check_method() -> None:
    check_method(Upl, confident=2)
