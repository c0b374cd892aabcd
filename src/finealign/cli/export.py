"""`finealign export`: write a model for another library."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from finealign.cli.app import app
from finealign.cli.guards import print_json, refuse_launcher, working
from finealign.cli.options import AsJson, ExpectedPrior, Model, ScoreKind, UsedModel
from finealign.errors import FinealignError


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[
        Literal["open_clip", "hf", "onnx"], typer.Option(help="open_clip; hf: transformers; onnx: one file.")
    ],
    use: UsedModel = None,
    class_prior: ExpectedPrior = None,
    score: ScoreKind = None,
    push: Annotated[str | None, typer.Option(help="ORG/NAME on the hub to upload what was written to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="For yourself alone on the hub.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapted model for another library, checked there against finealign's own scores."""
    with working(as_json):
        refuse_launcher()
        from finealign.classifier import FineAlign
        from finealign.cli.tables import exported_lines
        from finealign.export.hub import push as upload
        from finealign.export.run import export as write

        if private and not push:
            raise FinealignError("--private is of what --push uploads. Give --push ORG/NAME, or leave it out.")
        loaded = FineAlign.load(model, use=use, class_prior=class_prior, device="cpu", precision="fp32")
        result = write(loaded, out, format=format, score=score, overwrite=overwrite).as_json()
        result["url"] = upload(out, push, private) if push else None
        if as_json:
            print_json(result)
            return
        exported_lines(result, Console())
