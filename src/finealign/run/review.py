"""The review of a run: its plan in the run folder, its labels there or elsewhere, and what they say."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finealign.errors import ImageInputError, ModelError, OutputError
from finealign.images.listing import list_images
from finealign.images.shards import find_shard
from finealign.images.tables import read_table
from finealign.review.figures import Measured, measure
from finealign.review.labels import LabelFile
from finealign.review.plan import Plan, absolute
from finealign.review.sampling import Aim
from finealign.run.contract import LABELS, LEARNED_FROM, PREDICTIONS, REVIEW, RUN
from finealign.runtime.atomic import save_text

LOOKED_FOR = 100  # images, to see whether they are where they were


@dataclass(frozen=True)
class Review:
    """A review that was begun."""

    plan: Plan
    labels: Path  # the file of labels

    def figures(self) -> Measured:
        """What the labels so far say. Raises OutputError where their file cannot be read."""
        rows = LabelFile(self.labels, self.plan.classes, mend=False).rows
        return measure(self.plan, {path: label for path, (label, _) in rows.items()})


def require_complete(folder: Path) -> dict[str, Any]:
    """The ``run.json`` of a complete run. Raises ModelError for anything else."""
    try:
        told: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
        status = told["status"]
    except FileNotFoundError:
        raise ModelError(f"No run in {folder}: {RUN} is not there. Wanted: a folder of `finealign adapt`.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder / RUN} cannot be read: {error}. Copy the run folder again.") from error
    if status != "complete":
        raise ModelError(
            f"The run in {folder} is {status!r}, and only a complete one can be reviewed. Go on with "
            "`finealign adapt ... --resume`."
        )
    return told


def read_review(folder: Path) -> Review | None:
    """The review of a run; None if none was begun. Raises ModelError where it cannot be read."""
    path = folder / REVIEW
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Review(Plan.from_json(values["plan"]), Path(os.path.normpath(folder / values["labels"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Copy it again, or begin another review with "
            "`finealign review ... --overwrite`, which keeps the labels."
        ) from error


def save_review(review: Review, folder: Path) -> None:
    """Write the plan into the run folder. Raises OutputError."""
    own = review.labels.absolute() == (folder / LABELS).absolute()  # so that the folder can be moved
    labels = LABELS if own else str(review.labels.absolute())
    save_text(json.dumps({"labels": labels, "plan": review.plan.as_json()}) + "\n", folder / REVIEW)


def images_of(folder: Path) -> list[Path]:
    """The images that the run was adapted to, by its predictions. Raises ImageInputError if none is there any more."""
    paths = [Path(row["path"]) for row in read_table(folder / PREDICTIONS, ["path"])]
    first = paths[0] if paths else ""
    if not any(path.exists() for path in paths[:LOOKED_FOR]) and not (paths and find_shard(paths[0])):
        raise ImageInputError(
            f"The images of the run are not where they were; the first was at '{first}'. Go to the folder in which "
            "the run was started, or say with --images where they are."
        )
    return paths


def learned_from(folder: Path) -> list[str]:
    """The paths of the images whose labels a run has learned from; empty where it learned without labels."""
    table = folder / LEARNED_FROM
    return [row["path"] for row in read_table(table, ["path"])] if table.exists() else []


def require_same(
    begun: Review,
    folder: Path,
    *,
    aim: Aim | None,
    seed: int | None,
    learning: int | None,
    images: str | None,
    labels: Path | None,
) -> None:
    """Raise OutputError where a review that is to go on was begun otherwise. None: as it was begun."""
    plan, differing = begun.plan, []
    if aim is not None and aim != plan.aim:
        differing.append("aim")
    if seed is not None and seed != plan.seed:
        differing.append("seed")
    if learning is not None and learning != len(plan.learning):
        differing.append("learning")
    if images is not None:
        there = {absolute(path) for path in list_images(images)}
        if not all(item.path in there for item in plan.measuring):
            differing.append("images")
    if labels is not None and labels.absolute() != begun.labels.absolute():
        differing.append("out")
    if differing:
        raise OutputError(
            f"A review of {folder} was begun with another --{' and --'.join(differing)}; its labels "
            f"are in {begun.labels}. Leave the option out to go on with it, or begin another with --overwrite, which "
            "keeps the labels."
        )
