"""``report.html``: what a run did, in one file that asks nothing of any network, made from the run folder alone."""

import base64
import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finealign.charts import Curve, by_epoch, calibration
from finealign.config import without_folder
from finealign.errors import ModelError, OutputError
from finealign.images import display_path, printable
from finealign.layout import (
    CONFIG,
    EVALUATION,
    EXAMPLES,
    EXAMPLES_LIST,
    METRICS,
    MODEL,
    PREDICTIONS,
    REPORT,
    RUN,
    SET_ASIDE,
)
from finealign.storage import save_text
from finealign.templates import fill

if TYPE_CHECKING:
    from markupsafe import Markup

MANIFEST = f"{MODEL}/finealign.json"
CLASSES_SHOWN = 40  # rows shown at once; the others unfold
CONFUSION_SHOWN = 30  # classes beyond which a matrix cannot be read
PAIRS_SHOWN = 12
RENEW = "Copy it again, or renew it with `finealign adapt ... --resume`."
ASIDE_SHOWN = 200


@dataclass(frozen=True)
class Pair:
    """Two classes that are often the best two of an image."""

    first: str
    second: str
    images: int
    lead: float  # mean difference of their probabilities


@dataclass(frozen=True)
class Predicted:
    """What ``predictions.csv`` says of all images."""

    images: int
    changed: int
    now: Mapping[str, int]  # images by class
    before: Mapping[str, int]  # by the model adaptation started from
    pairs: tuple[Pair, ...]  # the most frequent first


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder and say where it is; one that is there is replaced.

    Raises ModelError when the folder holds no run or one that is not complete, and OutputError.
    """
    path = folder / REPORT
    save_text(render(folder), path)
    return path


def save_evaluation(found: Mapping[str, object], folder: Path) -> None:
    """Keep what labels told in the run folder, for its report; what an earlier evaluation left is replaced."""
    if not (folder / RUN).is_file():
        raise OutputError(f"{folder} holds no run, so there is nowhere to keep its evaluation.")
    save_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", folder / EVALUATION)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, one an epoch; none where there is no such file.

    A line torn by an interruption ends them: that epoch's checkpoint was not written either.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or type(record.get("epoch")) is not int:
            break
        found.append(record)
    return found


def render(folder: Path, *, measured: bool = True) -> str:
    """The report of a run folder as HTML; ``measured``: with what labels told. Raises ModelError as above."""
    from jinja2 import UndefinedError

    run = _read_json(folder / RUN)
    if run.get("status") != "complete":
        raise ModelError(
            f"The run in {folder} is {run.get('status', 'of no known status')!r}, and only a complete one has a "
            "report. Go on with `finealign adapt ... --resume`."
        )
    try:
        manifest = _read_json(folder / MANIFEST)
        evaluation = _read_json(folder / EVALUATION) if measured and (folder / EVALUATION).is_file() else None
        epochs = read_metrics(folder / METRICS)
        predicted = read_predictions(folder / PREDICTIONS)
        classes: list[str] = run["classes"]
        values = {
            "css": _page("base.css") + _page("report.css"),
            "run": run,
            "classes": classes,
            "epochs": epochs,
            "charts": _charts(epochs, classes),
            "predicted": predicted,
            "balance": _balance(predicted, classes),
            "examples": _examples(folder / EXAMPLES),
            "texts": manifest["descriptions"],
            "templates": manifest["templates"],
            "aside": list(_rows(folder / SET_ASIDE)),
            "settings": _read(folder / CONFIG),
            "evaluation": evaluation,
            "measured": None if evaluation is None else _measured(evaluation, classes),
            "shown": {"classes": CLASSES_SHOWN, "aside": ASIDE_SHOWN},
            "name": display_path(folder.resolve().name),
            "backbone": without_folder(run["backbone"]),
        }
        filters: dict[str, Callable[..., Any]] = {
            "share": _share,
            "points": _points,
            "code": _code,
            "printable": printable,
        }
        return fill("report.html.j2", values, filters)
    except (AttributeError, LookupError, ArithmeticError, TypeError, ValueError, csv.Error, UndefinedError) as error:
        raise ModelError(
            f"The run in {folder} is not whole, or of an earlier version ({type(error).__name__}: {error}). Copy it "
            "again, or renew it with `finealign adapt ... --resume`."
        ) from error


def read_predictions(path: Path) -> Predicted:
    """Count what a run's predictions say. Raises ModelError, or KeyError and ValueError for a file that is not such."""
    now: Counter[str] = Counter()
    before: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    leads: defaultdict[tuple[str, str], float] = defaultdict(float)
    changed = 0
    for row in _rows(path):
        now[row["label"]] += 1
        before[row["start_label"]] += 1
        changed += row["label"] != row["start_label"]
        first, second = sorted((row["label"], row["label_2"]))
        together[first, second] += 1
        leads[first, second] += float(row["confidence"]) - float(row["confidence_2"])
    pairs = [Pair(*names, images, leads[names] / images) for names, images in together.most_common(PAIRS_SHOWN)]
    return Predicted(images=now.total(), changed=changed, now=now, before=before, pairs=tuple(pairs))


def _charts(epochs: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[dict[str, str]]:
    """Curves of what training can see without labels: what each shows, in words, and its picture."""
    if not epochs:
        return []
    even = 1 / len(classes)
    kinds: list[tuple[str, str, Sequence[dict[str, Any]], Callable[[dict[str, Any]], float], bool]] = [
        ("Loss", "What training lowers: cross-entropy and fairness.", epochs, lambda one: one["loss"], False),
        (
            "Pseudo-labels that changed",
            "Share of images whose label differs from the epoch before. It should fall.",
            epochs[1:],  # the first epoch has none before it
            lambda one: one["changed"],
            True,
        ),
        (
            "Mean weight",
            "How far labels are trusted: low where classes compete.",
            epochs,
            lambda one: one["mean_weight"],
            True,
        ),
        (
            "Largest class",
            f"Share of images given the most frequent class. Even would be {even:.1%}.",
            epochs,
            lambda one: max(one["class_share"]),
            True,
        ),
    ]
    found = []
    for title, about, records, value, percent in kinds:
        if not records:
            continue
        x, y = [one["epoch"] for one in records], [value(one) for one in records]
        text = f"{_figure(y[-1], percent)} after epoch {x[-1]}"
        if len(y) > 1:
            text = f"From {_figure(y[0], percent)} after epoch {x[0]} to {_figure(y[-1], percent)} after {x[-1]}"
        svg = by_epoch([Curve(title, x, y)], name=title, percent=percent)
        found.append({"title": title, "about": about, "svg": svg, "text": f"{text}."})
    return found


def _figure(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _balance(predicted: Predicted, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class, the most frequent first, with its bars in percent of the longest."""
    longest = max([1, *predicted.now.values(), *predicted.before.values()])
    rows = []
    for name in classes:
        now, before = predicted.now.get(name, 0), predicted.before.get(name, 0)
        widths = {"now_width": 100 * now / longest, "before_width": 100 * before / longest}
        rows.append({"name": name, "now": now, "before": before, **widths})
    return sorted(rows, key=lambda row: (-row["now"], -row["before"]))


def _examples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Each kind's images with the picture as a data URL, boxes in percent, weights as shares of the largest."""
    kinds: dict[str, list[dict[str, Any]]] = _read_json(folder / EXAMPLES_LIST)
    for example in (one for examples in kinds.values() for one in examples):
        picture = folder / Path(example["picture"]).name
        try:
            encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
        except OSError as error:
            raise ModelError(f"{picture} cannot be read: {error}. Copy the run folder again.") from error
        example["url"] = f"data:image/jpeg;base64,{encoded}"
        largest = max((crop["weight"] for crop in example["crops"]), default=1) or 1
        for crop in example["crops"]:
            left, top, right, bottom = crop["box"]
            crop["style"] = (
                f"--share: {crop['weight'] / largest:.3f}; "
                f"left: {100 * left / example['width']:.2f}%; top: {100 * top / example['height']:.2f}%; "
                f"width: {100 * (right - left) / example['width']:.2f}%; "
                f"height: {100 * (bottom - top) / example['height']:.2f}%"
            )
    return kinds


def _measured(evaluation: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """What labels tell, arranged for the page."""
    rows = [
        {"name": name, **found, "gain": None if found["adapted"] is None else found["adapted"] - found["zero_shot"]}
        for name, found in evaluation["per_class"].items()
    ]
    rows.sort(key=lambda row: (row["gain"] is None, -(row["gain"] or 0)))
    curves = [
        Curve(
            name,
            [one["confidence"] for one in evaluation["calibration"][name]],
            [one["accuracy"] for one in evaluation["calibration"][name]],
            start=name == "zero_shot",
        )
        for name in ("zero_shot", "adapted")
    ]
    matrices = {}
    if len(classes) <= CONFUSION_SHOWN:
        matrices = {name: _matrix(cells, len(classes)) for name, cells in evaluation["confusion"].items()}
    return {"per_class": rows, "calibration": calibration(curves, name="calibration"), "matrices": matrices}


def _matrix(cells: Sequence[Sequence[int]], classes: int) -> list[list[dict[str, float]]]:
    """A row a true class: images, and the share of the row that they are."""
    counts = [[0] * classes for _ in range(classes)]
    for truth, named, images in cells:
        counts[truth][named] = images
    return [[{"images": one, "share": one / max(1, sum(row))} for one in row] for row in counts]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as opened:
            yield from csv.DictReader(opened)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the run folder again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the run folder again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, not an object. Copy the run folder again.")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.name == RUN:
            problem = f"No run in {path.parent}: {RUN} is not there. Wanted: a folder of `finealign adapt`."
        else:
            problem = f"{path} is missing: the run is not whole, or of an earlier version. {RENEW}"
        raise ModelError(problem) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the run folder again.") from error


def _page(name: str) -> str:
    return files("finealign").joinpath("pages", name).read_text(encoding="utf-8")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _code(text: str) -> "Markup":
    """Escaped, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
