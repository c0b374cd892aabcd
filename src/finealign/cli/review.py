"""`finealign review`: label images in a browser, and measure by few labels."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from finealign.cli.app import app
from finealign.cli.guards import print_json, refuse_launcher, require, tell_left_out, tell_set_aside, working
from finealign.cli.options import AsJson, Device, Precision

if TYPE_CHECKING:  # they import torch, which is slow
    from finealign.review.figures import Measured
    from finealign.review.intervals import Estimate
    from finealign.run.review import Review

BUDGET = 60


@app.command()
def review(
    run: Annotated[Path, typer.Argument(help="A run folder of `finealign adapt`.")],
    images: Annotated[
        str | None, typer.Option(help="Review these: a folder, a list or a CSV. Default: those adapted to.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help=f"Images to label for the figures. Default: {BUDGET}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="FILE.csv for the labels. Default: labels.csv in the run.")] = None,
    aim: Annotated[
        Literal["both", "accuracy", "difference", "random"] | None,
        typer.Option(
            help="What to measure: the accuracies, by how much the models differ, or both (the default). random: draw "
            "every image alike."
        ),
    ] = None,
    learning: Annotated[
        int | None, typer.Option(min=0, help="Further images to label, to learn from; they are not measured by.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which images are drawn. Default: 0.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin another review of the run. Labels stay and are not asked again.")
    ] = False,
    host: Annotated[str, typer.Option(help="The address to listen on. There is no login: mind who can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0: a free one.")] = 8010,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name to answer to, as of a proxy before it; as often as wanted.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Label some images in a browser, and learn how good the model is and whether adaptation helped.

    It can be stopped at any time, and the same command goes on. Every label is on disk before the next image is shown.
    """
    with working(as_json):
        refuse_launcher()
        require("serve", "fastapi", "uvicorn", "python_multipart")
        from finealign.review.labels import LabelFile
        from finealign.review.session import Session
        from finealign.run.contract import LABELS
        from finealign.run.lock import held_file
        from finealign.run.review import read_review, require_complete, require_same, save_review
        from finealign.serve.server import serve_review

        screen = Console(stderr=True)
        told = require_complete(run)
        begun = None if overwrite else read_review(run)
        if begun:
            require_same(begun, run, aim=aim, seed=seed, learning=learning, images=images, labels=out)
        path = out or (begun.labels if begun else run / LABELS)
        with held_file(path):
            labels = LabelFile(path, begun.plan.classes if begun else told["classes"])
            if labels.cut_off:
                tell_left_out(f"The last line of {path} was not whole, and was removed.", screen)
            if begun is None:
                begun = _begin(
                    run,
                    path,
                    images,
                    {"aim": aim or "both", "budget": budget or BUDGET, "learning": learning or 0, "seed": seed or 0},
                    device=device,
                    precision=precision,
                )
                save_review(begun, run)
            session = Session(begun.plan, labels, target=budget or begun.plan.budget)

            def tell(address: str) -> None:
                if as_json:
                    progress = session.progress()
                    print_json(
                        {
                            "address": address,
                            "labels": str(path),
                            "labelled": progress.labelled,
                            "target": progress.target,
                            "aim": session.plan.aim,
                            "measured": session.figures().as_json(),
                        }
                    )
                else:
                    typer.echo(f"Open {address} in a browser and label what you see. Ctrl-C stops; nothing is lost.")

            serve_review(session, host, port, allow_hosts=allow_host or (), on_listening=tell)
            if not as_json:
                _tell(session.figures(), screen)
                screen.print(
                    f"Labels: [bold]{escape(str(path))}[/]. `finealign report {escape(str(run))}` puts the "
                    "figures into the report.",
                    soft_wrap=True,
                    highlight=False,
                )


def _begin(
    run: Path,
    labels: Path,
    images: str | None,
    wanted: Mapping[str, Any],
    *,
    device: str,
    precision: Literal["auto", "fp32", "bf16", "fp16"],
) -> "Review":
    """Let both models label the images, and choose those to ask about."""
    from finealign.classifier import FineAlign
    from finealign.cli.bars import Bars
    from finealign.images.listing import left_out_of, list_images
    from finealign.model.inference import readable
    from finealign.review.plan import look_at, make_plan
    from finealign.run.review import Review, images_of, learned_from
    from finealign.types import SetAside

    screen, set_aside = Console(stderr=True), list[SetAside]()
    paths = list_images(images) if images else images_of(run)
    model = FineAlign.load(run, use="adapted", device=device, precision=precision)
    with Bars().stage("labelling by both models", len(paths)) as stage:
        outcomes = model.iter_predictions(paths, with_start=True)
        seen = look_at(readable(outcomes, set_aside, stage.advance), classes=len(model.texts_.classes))
    tell_left_out(left_out_of(paths), screen)
    tell_set_aside([asdict(row) for row in set_aside], screen)
    plan = make_plan(seen, model.texts_.classes, learned_from=learned_from(run), **wanted)
    return Review(plan, labels)


def _tell(found: "Measured", screen: Console) -> None:
    """Print the figures."""
    if found.difference is None and found.adapted is None:
        what = f"the first figures come with {found.next_look}" if found.next_look else "there are no figures"
        screen.print(f"{found.labelled} labels so far; {what}.", soft_wrap=True, highlight=False)
        return

    def share(name: str, one: "Estimate | None") -> None:
        if one:
            screen.print(f"{name}: {one.value:.1%} ({one.low:.1%} to {one.high:.1%})", highlight=False)

    screen.print(f"From {found.labels} labels, with 95 % intervals that hold whenever you stop:", highlight=False)
    share("  the adapted model is right in", found.adapted)
    share("  the model before adaptation in", found.start)
    if gain := found.difference:
        screen.print(
            f"  difference: {100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})",
            highlight=False,
        )
