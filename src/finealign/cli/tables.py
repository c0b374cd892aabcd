"""Tables and summaries in a terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # the demo imports torch, which is slow
    from finealign.benchmark.catalogue import DataSet
    from finealign.demo.result import DemoResult
    from finealign.types import Use

ALIKE_SHOWN = 10  # pairs of classes listed at most


def evaluation_tables(found: dict[str, Any], console: Console) -> None:
    """Print an evaluation's summary (see ``evaluate.summary``) as tables."""
    overall = Table(title=f"{found['images']} labelled images, 95 % intervals in brackets", title_justify="left")
    overall.add_column("")
    for name in ("start", "adapted"):
        overall.add_column(f"{name}, in use" if found["use"] == name else name, justify="right")
    start, adapted = found["start"], found["adapted"]
    for name, label in (("top1", "top-1"), ("balanced", "balanced accuracy")):
        overall.add_row(label, _with_interval(start, name), _with_interval(adapted, name))
    overall.add_row("top-5", f"{start['top5']:.1%}", f"{adapted['top5']:.1%}")
    for name, label in (("ece", "calibration error"), ("brier", "Brier score, 0 to 2")):
        overall.add_row(label, f"{start[name]:.3f}", f"{adapted[name]:.3f}")
    console.print(overall)
    gain = found["difference"]
    console.print(
        f"Difference on the same images: [bold]{100 * gain['top1']:+.1f} points[/bold] top-1 "
        f"(95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}), "
        f"[bold]{100 * gain['balanced']:+.1f} points[/bold] balanced accuracy "
        f"({100 * gain['balanced_low']:+.1f} to {100 * gain['balanced_high']:+.1f}).",
        soft_wrap=True,
    )
    if found["adapted_to"]:
        share = "All" if found["adapted_to"] == found["images"] else f"{found['adapted_to']} of the {found['images']}"
        console.print(
            f"{share} images measured here are among those the model was adapted to, without their labels: the figures "
            "tell how well it labels these, and need not hold for images that it has never seen.",
            soft_wrap=True,
        )
    if found["class_prior"] == "even":
        console.print("The adapted model took each class for as likely as another.")
    console.print()
    classes = Table(title="Per class", title_justify="left")
    for name in ("class", "images", "start", "adapted"):
        classes.add_column(name, justify="left" if name == "class" else "right")
    for name, row in found["per_class"].items():
        classes.add_row(escape(name), str(row["images"]), _percent(row["start"]), _percent(row["adapted"]))
    console.print(classes)
    if found["confused_pairs"]:
        when = "before" if found["use"] == "start" else "after"
        pairs = Table(title=f"Most confused {when} adaptation", title_justify="left")
        for name in ("is", "taken for", "images", "of the class"):
            pairs.add_column(name, justify="left" if name in ("is", "taken for") else "right")
        for pair in found["confused_pairs"]:
            pairs.add_row(escape(pair["truth"]), escape(pair["predicted"]), str(pair["count"]), f"{pair['share']:.0%}")
        console.print(pairs)


def demo_table(found: "DemoResult", console: Console) -> None:
    """Print the result of each method of the demo, and the baselines to compare it with."""
    from finealign.demo.result import METHODS, START, SYNTHETIC, points

    table = Table(title=f"{found.test} test images; {found.unlabelled} without labels to learn from")
    for name in ("method", "what it is", "top-1", "seconds", "images/s"):
        table.add_column(name, justify="left" if name in ("method", "what it is") else "right")
    for row in found.methods:
        figures = f"{row.top1.mean:.1%}", f"{row.seconds:.1f}", f"{row.images_per_second:.0f}"
        table.add_row(row.method, METHODS[row.method], *figures, style="bold" if row.run else None)
    console.print(table)
    for row in found.methods:
        if row.run and row.gain:
            console.print(
                f"{row.method} against {START} on the same images: [bold]{points(row.gain)}[/] points; "
                f"its own score with nothing learned is {row.curve[0]:.1%}.",
                highlight=False,
            )
    console.print(f"Chance is {found.chance:.1%}. {SYNTHETIC}", highlight=False)


def described_lines(found: dict[str, Any], console: Console, notes: Console) -> None:
    """Print what was described and at what cost.

    ``notes`` gets the classes whose descriptions are still similar, and the warning if there is one.
    """
    tokens = found["tokens"]
    console.print(
        f"{found['texts']} descriptions of {len(found['classes'])} classes by {found['requests']} requests "
        f"({tokens['prompt']} + {tokens['completion']} tokens), {sum(found['rejected'].values())} texts rejected.",
        highlight=False,
        soft_wrap=True,
    )
    for pair in found["alike"][:ALIKE_SHOWN]:
        first, second = pair["classes"]
        notes.print(
            f"[yellow]still alike to the encoder:[/] {escape(first)}, {escape(second)} ({max(pair['shares']):.0%} of "
            "the texts of one are nearer the other).",
            soft_wrap=True,
            highlight=False,
        )
    if len(found["alike"]) > ALIKE_SHOWN:
        notes.print(f"and {len(found['alike']) - ALIKE_SHOWN} more pairs, in the record.", highlight=False)
    if found["warning"]:
        notes.print(f"[yellow]warning:[/] {escape(found['warning'])}", soft_wrap=True, highlight=False)
    for name, path in (("Descriptions", found["out"]), ("Record", found["record"])):
        console.print(f"{name}: [bold]{escape(path)}[/]", soft_wrap=True, highlight=False)


def exported_lines(found: dict[str, Any], console: Console) -> None:
    """Print what was written, and the measured differences from finealign's own scores."""
    from finealign.model.fitted import CALLED

    table = Table(title=f"{found['format']}, {CALLED[found['use']]}, score {found['score']}", title_justify="left")
    for name in ("held against finealign", "largest difference", "at most"):
        table.add_column(name, justify="left" if name.startswith("held") else "right")
    for name, measure in found["parity"].items():
        table.add_row(escape(name), f"{measure['largest']:.1e}", f"{measure['promised']:.1e}")
    console.print(table)
    for note in found["notes"]:
        console.print(escape(note), soft_wrap=True, highlight=False)
    console.print(f"Export: [bold]{escape(found['out'])}[/]", soft_wrap=True, highlight=False)
    if found["url"]:
        console.print(f"On the hub: [bold]{escape(found['url'])}[/]", soft_wrap=True, highlight=False)


def verdict_lines(verdict: dict[str, Any], kept: "Use", why_kept: str, console: Console) -> None:
    """Print whether adaptation helped, how that was judged, what to do, and which model is used."""
    from finealign.model.fitted import CALLED, OTHER

    colour = {"helped": "green", "unclear": "yellow", "hurt": "red"}[verdict["call"]]
    console.print(
        f"Verdict, judged without labels: [bold {colour}]{verdict['call']}[/] ({verdict['most']:.0f} % of the labels "
        f"changed). {escape(verdict['advice'])}",
        highlight=False,
    )
    console.print(
        f"In use is [bold]{CALLED[kept]}[/], as {why_kept}. Both are saved: --use {OTHER[kept]} takes the other one.",
        highlight=False,
        soft_wrap=True,
    )


def catalogue_table(sets: "Iterable[DataSet]", console: Console) -> None:
    """Print the data sets that the benchmark knows, and how to get each."""
    table = Table(box=None)
    for name in ("name", "classes", "texts", "fetched", "where to get it"):
        justify: Literal["left", "right"] = "right" if name == "classes" else "left"
        table.add_column(name, justify=justify, no_wrap=name != "where to get it", overflow="fold")
    for data_set in sets:
        texts, fetched = "ours" if data_set.texts else "-", "--download" if data_set.fetched else "-"
        table.add_row(data_set.name, str(data_set.classes), texts, fetched, escape(data_set.page))
    console.print(table)


def _with_interval(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.1%} ({row[f'{name}_low']:.1%} to {row[f'{name}_high']:.1%})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
