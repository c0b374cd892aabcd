"""`finealign predict`: classify images with an adapted model."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from finealign.cli.app import app
from finealign.cli.guards import print_json, stoppable, tell_left_out, tell_set_aside, working
from finealign.cli.options import (
    AsJson,
    Device,
    Exclude,
    ExpectedPrior,
    LeastConfidence,
    Model,
    Precision,
    RejectShare,
    ScoreKind,
    UsedModel,
)

if TYPE_CHECKING:  # it imports torch, which is slow
    from finealign.types import Prediction, SetAside


@app.command()
def predict(
    model: Model,
    images: Annotated[
        str, typer.Argument(help="A folder, an image, a .txt list, a .csv with a column path, or hf:NAME:SPLIT.")
    ],
    out: Annotated[Path | None, typer.Option(help="FILE.csv, .jsonl or .parquet. Default: CSV to the screen.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes a row.")] = 1,
    use: UsedModel = None,
    class_prior: ExpectedPrior = None,
    score: ScoreKind = None,
    reject: RejectShare = None,
    min_confidence: LeastConfidence = None,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also link each image in DIR, in a folder of its label.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="With --sort-into: copies in place of links.")] = False,
    exclude: Exclude = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it is there.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images with an adapted model."""
    with working(as_json):
        from finealign.classifier import FineAlign
        from finealign.cli.bars import Bars
        from finealign.errors import ConfigError, display_path
        from finealign.images.listing import left_out_of
        from finealign.images.sources import find_images
        from finealign.images.tables import set_aside_csv
        from finealign.model.fitted import CALLED
        from finealign.model.inference import readable, tell_blank
        from finealign.model.predictions import (
            Row,
            beside,
            best_rows,
            check_destination,
            write_csv,
            write_predictions,
        )
        from finealign.model.refusal import (
            NONE_OF_THESE,
            UNSURE,
            cutoff,
            in_place_of_class,
            least_confidence,
            read_reject,
        )
        from finealign.model.sorting import Sorter, refuse_within
        from finealign.runtime.distributed import Ranks
        from finealign.types import SetAside

        share = read_reject(reject)
        ranks = Ranks.launched(device)

        if out:
            check_destination(out, overwrite=overwrite)
            check_destination(beside(out), overwrite=overwrite)
        if copy and not sort_into:
            raise ConfigError("--copy says how --sort-into DIR sorts. Give both, or leave --copy out.")
        paths = find_images(images, exclude=exclude or ())
        if sort_into:
            refuse_within(sort_into, images)
        loaded = FineAlign.load(
            model, use=use, class_prior=class_prior, device=device, precision=precision, ranks=ranks
        )
        refused_from = cutoff(loaded.model_, share)
        unsure_below = least_confidence(loaded.model_, min_confidence)
        names = loaded.texts_.classes
        sorter = Sorter(sort_into, names, copy=copy) if sort_into else None
        set_aside: list[SetAside] = []
        rows: list[Row] = []
        labels_apart = {NONE_OF_THESE: 0, UNSURE: 0}
        blanks = 0
        first_blank = ""

        def counted(predictions: Iterable["Prediction"]) -> Iterator["Prediction"]:
            nonlocal blanks, first_blank
            for prediction in predictions:
                if prediction.blank:
                    blanks, first_blank = blanks + 1, first_blank or display_path(prediction.path)
                apart = in_place_of_class(prediction, refused_from, unsure_below)
                if apart:
                    labels_apart[apart] += 1
                if sorter and ranks.first:
                    sorter.add(prediction.path, apart or names[int(prediction.probabilities.argmax())])
                yield prediction

        def go_on() -> str:
            kept = f"What was sorted stays in {sort_into}" if sort_into else "No file was written"
            return f"{kept}; the same command starts again."

        with (
            stoppable(Bars(drawn=ranks.first), go_on=go_on) as progress,
            progress.stage("predicting", len(paths)) as stage,
        ):
            outcomes = loaded.iter_predictions(paths, score=score)
            predictions = counted(_some(readable(outcomes, set_aside, progress.between(stage, ranks)), set_aside))
            if not ranks.first:
                count = sum(1 for _ in predictions)
            elif out:
                count = write_predictions(
                    predictions, names, out, top_k=top_k, refused_from=refused_from, unsure_below=unsure_below
                )
            elif as_json:
                rows = list(best_rows(predictions, names, top_k, refused_from=refused_from, unsure_below=unsure_below))
                count = len(rows)
            else:
                found = best_rows(predictions, names, top_k, refused_from=refused_from, unsure_below=unsure_below)
                count = write_csv(found, sys.stdout, min(top_k, len(names)))
        ranks.leave()
        if not ranks.first:
            return
        if out and set_aside:
            set_aside_csv(set_aside, beside(out))
        elif out:
            with suppress(OSError):
                beside(out).unlink(missing_ok=True)  # left by an earlier run that is replaced
        if as_json:
            result: dict[str, Any] = {
                "use": loaded.use_,
                "class_prior": loaded.class_prior_,
                "images": count,
                "set_aside": [asdict(row) for row in set_aside],
                "left_out": left_out_of(paths),
                "blank": tell_blank(blanks, first_blank),
            }
            if share is not None:
                result["refused"] = labels_apart[NONE_OF_THESE]
            if unsure_below is not None:
                result["unsure"] = labels_apart[UNSURE]
            if sorter:
                result["sorted"] = sorter.as_json()
            print_json(result | ({"out": str(out)} if out else {"predictions": [row.as_json() for row in rows]}))
            return
        notes = Console(stderr=True)
        evenly = ", which takes each class for as likely" if loaded.class_prior_ == "even" else ""
        if out:
            notes.print(f"{count} predictions in {escape(str(out))}, by {CALLED[loaded.use_]}{evenly}.", soft_wrap=True)
        elif loaded.use_ == "start":
            notes.print(
                f"These are predictions by {CALLED['start']}; --use adapted takes the adapted one.", soft_wrap=True
            )
        if share is not None:
            refusals = labels_apart[NONE_OF_THESE]
            notes.print(f"{refusals} of {count} are '{NONE_OF_THESE}' (--reject {share}).", soft_wrap=True)
        if unsure_below is not None:
            notes.print(
                f"{labels_apart[UNSURE]} of {count} are '{UNSURE}' (--min-confidence {unsure_below}).", soft_wrap=True
            )
        if sorter:
            notes.print(escape(sorter.told()), soft_wrap=True, highlight=False)
        tell_left_out(left_out_of(paths), notes)
        tell_left_out(tell_blank(blanks, first_blank), notes)
        tell_set_aside([asdict(row) for row in set_aside], notes)


def _some(predictions: Iterable["Prediction"], set_aside: "Sequence[SetAside]") -> Iterable["Prediction"]:
    """The predictions, of which the first is made at once. Raises ImageInputError where there is none.

    ``set_aside`` is filled while predictions are made.
    """
    from finealign.errors import ImageInputError, display_path

    made = iter(predictions)
    first = next(made, None)
    if first is None:
        what = "The only image" if len(set_aside) == 1 else f"None of the {len(set_aside)} images"
        verb = "cannot be read" if len(set_aside) == 1 else "can be read"
        raise ImageInputError(
            f"{what} {verb}, so there is nothing to predict; the first is '{display_path(set_aside[0].path)}' "
            f"({set_aside[0].reason}). Paths in a list are relative to the folder of the list."
        )
    return chain([first], made)
