"""GTA-CLIP: TransCLIP with descriptions that learn, against its equations over lists."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from finealign.methods.gta_clip import GtaClip
from finealign.testing import check_method
from finealign.types import PseudoLabels, TextFeatures
from test_methods import SCALE, Matrix, backward, best, dot, make, softmax, texts, unit, unit_of
from test_peers import fitted, near_texts, whole


def gta_clip(known: TextFeatures | None = None, **options: Any) -> GtaClip:
    method = make("gta-clip", known, **{"logit_scale": SCALE} | options)
    assert isinstance(method, GtaClip)
    return method


def shift(method: GtaClip) -> Matrix:
    with torch.no_grad():
        method.descriptions.add_(0.5 * unit(*method.descriptions.shape, seed=5))
    return [unit_of(row) for row in method.descriptions.tolist()]


@pytest.mark.parametrize("confident", [0, 8])
def test_survey__of_one_description_a_class_is_transclips(confident: int) -> None:
    known = TextFeatures(unit(4, 6, seed=0), unit(4, 6, seed=1), torch.arange(4))
    weak = near_texts(13, known=known)
    method, wanted = gta_clip(known, confident=confident), fitted("transclip", weak, known, confident=confident)
    method.survey(weak)
    for name in ("assigned", "means", "variance"):
        torch.testing.assert_close(method.get_buffer(name), wanted.get_buffer(name))
    seen = whole(near_texts(5, seed=1, known=known))
    torch.testing.assert_close(method.score(seen, "global").detach(), wanted.score(seen, "global"))


def test_score__by_the_mean_of_the_cosines_with_a_classs_descriptions() -> None:
    known, weak = texts(), unit(3, 6, seed=9)
    method = gta_clip(known)
    learned = shift(method)
    wanted = []
    for row in weak.tolist():
        of_class = [
            [dot(row, text) for text, c in zip(learned, known.class_of.tolist(), strict=True) if c == d]
            for d in range(4)
        ]
        wanted.append(softmax([SCALE * math.fsum(values) / len(values) for values in of_class]))
    found = method.probabilities(method.score(whole(weak), "global")).detach()
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize(("classes", "n", "tuned_on"), [(1, 5, 2), (4, 13, 2), (4, 13, 8), (4, 3, 8), (9, 1, 1)])
def test_pseudo_label__counts_the_most_probable_images_of_each_class(classes: int, n: int, tuned_on: int) -> None:
    known = texts(classes)
    weak = near_texts(n, classes=classes, known=known)
    method = gta_clip(known, tuned_on=tuned_on)
    method.survey(weak)
    z: Matrix = method.assigned.tolist()
    picked = [sorted(range(n), key=lambda i: -z[i][c])[:tuned_on] for c in range(classes)]
    if classes == 1:  # of which all are as probable
        picked = method.picked.T.tolist()
        assert len(set(picked[0])) == tuned_on
    order = torch.arange(n).flip(0)
    found = method.pseudo_label(whole(weak[order]))
    for place, i in enumerate(order.tolist()):
        own = [c for c in range(classes) if i in picked[c]]
        assert found.weights[place] == bool(own)
        wanted = [(c in own) / len(own) for c in range(classes)] if own else z[i]
        assert found.probabilities[place].tolist() == pytest.approx(wanted)
        assert int(found.labels[place]) == (max(own, key=lambda c: z[i][c]) if own else best(z[i]))


def test_loss__images_find_descriptions_and_descriptions_images() -> None:
    known, strong = texts(), unit(5, 6, seed=9)
    method = gta_clip(known)
    learned, owner = shift(method), known.class_of.tolist()
    shares = [[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0], [1.0, 0, 0, 0]]
    weights = [1.0, 1.0, 0.5, 0.0, 1.0]
    counted = [i for i, weight in enumerate(weights) if weight]
    logits = [[SCALE * dot(row, text) for text in learned] for row in strong.tolist()]
    sizes = [owner.count(c) for c in range(4)]
    of_image = [[shares[i][c] / sizes[c] for c in owner] for i in range(5)]
    to_texts = math.fsum(
        -weights[i] * of_image[i][m] * math.log(softmax(logits[i])[m]) for i in counted for m in range(len(owner))
    ) / len(counted)
    of_texts = []
    for m in range(len(owner)):
        own = [i for i in counted if of_image[i][m]]
        column = dict(zip(counted, softmax([logits[i][m] for i in counted]), strict=True))
        if own:
            total = math.fsum(weights[i] for i in own)
            of_texts.append(math.fsum(-weights[i] * math.log(column[i]) for i in own) / total)
    assert len(of_texts) < len(owner)  # nothing is asked of the descriptions of a class that is not there
    pseudo = PseudoLabels(
        torch.tensor([0, 1, 1, 3, 0]),
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(shares, dtype=torch.float64),
    )
    found = method.loss(strong, pseudo).total
    assert float(found.detach()) == pytest.approx(to_texts + math.fsum(of_texts) / len(of_texts), rel=1e-9)
    backward(found)
    assert method.descriptions.grad is not None
    assert bool(method.descriptions.grad.any())


def test_loss__is_nothing_where_no_image_is_picked() -> None:
    method, strong = gta_clip(), unit(2, 6, seed=9).requires_grad_()
    pseudo = PseudoLabels(torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.eye(4)[[0, 0]])
    found = method.loss(strong, pseudo).total
    backward(found)
    assert float(found.detach()) == 0


def test_classifier__is_the_mean_of_the_learned_descriptions() -> None:
    known = texts()
    method = gta_clip(known)
    learned = torch.tensor(shift(method), dtype=torch.float64)
    wanted = torch.stack([normalize(learned[known.class_of == c].mean(0), dim=0) for c in range(4)])
    torch.testing.assert_close(method.classifier()[:, 0].detach(), wanted)


def test_check_method() -> None:
    check_method(GtaClip, tuned_on=2, neighbours=2)
