"""`finealign report`: write a run's report again."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from finealign.cli.app import app
from finealign.cli.evaluate import measured, tell_not_measured
from finealign.cli.guards import print_json, refuse_launcher, working
from finealign.cli.options import AsJson, CountLearned, Device, Precision, ScoreKind
from finealign.errors import FinealignError


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder of `finealign adapt`.")],
    labelled: Annotated[
        Path | None, typer.Option(help="Measure on these too: a folder of class folders, or a CSV path,label.")
    ] = None,
    score: ScoreKind = None,
    count_learned: CountLearned = False,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a run's report.html anew, with accuracy, confusion and calibration where there are labels."""
    with working(as_json):
        refuse_launcher()
        from finealign.run.report import render, save_evaluation, write_report

        if score and not labelled:
            raise FinealignError("--score is of what --labelled measures. Give --labelled, or leave it out.")
        if count_learned and not labelled:
            raise FinealignError("--count-learned is of what --labelled measures. Give --labelled, or leave it out.")
        if labelled:
            from finealign.classifier import FineAlign

            render(run, measured=False)  # raises if there is no run to report, before any image is encoded
            loaded = FineAlign.load(run, device=device, precision=precision)
            figures, _ = measured(loaded, run, labelled, score, in_full=True, count_learned=count_learned)
            if not as_json:
                tell_not_measured(figures, Console(stderr=True))
            save_evaluation(figures | {"score": score or loaded.score_}, run)
        path = write_report(run)
        if as_json:
            print_json({"report": str(path)})
            return
        Console().print(f"Report: [bold]{escape(str(path))}[/]", soft_wrap=True, highlight=False)
