"""`finealign evaluate`: measure a model on labelled images."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from finealign.cli.app import app
from finealign.cli.guards import print_json, tell_left_out, tell_set_aside, working
from finealign.cli.options import (
    AsJson,
    CountLearned,
    Device,
    Exclude,
    ExpectedPrior,
    Model,
    Precision,
    ScoreKind,
    UsedModel,
)

if TYPE_CHECKING:  # they import torch, which is slow
    from finealign.classifier import FineAlign
    from finealign.types import Score, SetAside


@app.command()
def evaluate(
    model: Model,
    labelled: Annotated[Path, typer.Argument(help="A folder of class folders, or a CSV with columns path and label.")],
    use: UsedModel = None,
    class_prior: ExpectedPrior = None,
    score: ScoreKind = None,
    exclude: Exclude = None,
    count_learned: CountLearned = False,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure an adapted model, and the one it started from, on labelled images.

    Both are measured whatever --use says, which decides whose confusions are shown. --score is of the adapted one.
    """
    with working(as_json):
        from finealign.classifier import FineAlign
        from finealign.cli.tables import evaluation_tables
        from finealign.runtime.distributed import Ranks

        ranks = Ranks.launched(device)
        loaded = FineAlign.load(
            model, use=use, class_prior=class_prior, device=device, precision=precision, ranks=ranks
        )
        figures, set_aside = measured(
            loaded, model, labelled, score, exclude=exclude or (), count_learned=count_learned
        )
        ranks.leave()
        if not ranks.first:
            return
        if as_json:
            print_json(figures)
            return
        evaluation_tables(figures, Console())
        tell_not_measured(figures, Console(stderr=True))
        tell_set_aside([asdict(row) for row in set_aside], Console(stderr=True))


def tell_not_measured(figures: Mapping[str, Any], screen: Console) -> None:
    """Print what was left out of the labelled images, and what is among them that shows nothing."""
    from finealign.evaluate.truth import learned_line, unknown_line

    learned = learned_line(figures.get("learned_from"))
    for sentence in (figures["left_out"], unknown_line(figures["unknown"]), learned, figures["blank"]):
        tell_left_out(sentence, screen)


def measured(
    model: "FineAlign",
    folder: Path,
    labelled: Path,
    score: "Score | None",
    *,
    in_full: bool = False,
    exclude: Sequence[str] = (),
    count_learned: bool = False,
) -> "tuple[dict[str, object], list[SetAside]]":
    """Evaluate the adapted model and the start (the model before adaptation) on labelled images.

    ``folder`` is where the model was loaded from, and ``score`` is of the adapted model, which is the one in use
    afterwards. Returns the summary of ``evaluate_predictions``, which ``in_full`` extends by what a report draws, and
    the labelled images that could not be read. To the summary are added ``adapted_to``, how many of the measured images
    the model was adapted to, None where this is not known, ``class_prior``, how the adapted model took the images to be
    distributed, ``left_out``, what was in the folder besides the images, ``unknown``, how many images each name has
    that matches no class, and ``blank``, which images show nothing. Images whose labels the model was given are not
    measured unless ``count_learned`` is set; how many there are is then in ``learned_from``, with whether they count.
    Raises ImageInputError where no other is left.
    """
    from finealign.cli.bars import Bars
    from finealign.errors import display_path
    from finealign.evaluate.summary import evaluate_predictions
    from finealign.evaluate.truth import read_truth, without
    from finealign.model.inference import readable, tell_blank
    from finealign.run.folder import count_adapted_to, labelled_in

    names, use = model.texts_.classes, model.use_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is among the figures
        truth = read_truth(labelled, names, exclude=exclude)
    learned = labelled_in(folder, truth.paths, frozenset(model.model_.learned_from))
    if learned and not count_learned:
        truth = without(truth, learned)
    set_aside: list[SetAside] = []
    with Bars().stage("evaluating", len(truth.paths)) as stage:
        outcomes = model.use("adapted").iter_predictions(truth.paths, score=score, with_start=True)
        predictions = list(readable(outcomes, set_aside, stage.advance))
    figures = evaluate_predictions(predictions, truth, names, set_aside=len(set_aside), in_full=in_full, use=use)
    blank = [display_path(prediction.path) for prediction in predictions if prediction.blank]
    told_blank = tell_blank(len(blank), blank[0] if blank else "")
    adapted_to = count_adapted_to(folder, (prediction.path for prediction in predictions))
    return figures | {
        "adapted_to": adapted_to,
        "class_prior": model.class_prior_,
        "left_out": truth.left_out,
        "unknown": dict(truth.unknown),
        "blank": told_blank,
        **({"learned_from": {"images": len(learned), "counted": count_learned}} if learned else {}),
    }, set_aside
