"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: bf16 where it is fast, fp16 on older GPUs.")
]
ScoreKind = Annotated[
    Literal["global", "las", "fused"] | None,
    typer.Option("--score", help="global: one pass; las: crops; fused: a mean of both. Default: the model's."),
]
UsedModel = Annotated[
    Literal["start", "adapted"] | None,
    typer.Option("--use", help="adapted, or start: the one before adaptation. Default: the one the run chose."),
]
RejectShare = Annotated[
    str | None,
    typer.Option(
        "--reject",
        metavar="auto|SHARE",
        help="Label 'none of these' what likelier shows no class than one, or about that share, as 0.05.",
    ),
]
LeastConfidence = Annotated[
    float | None,
    typer.Option(
        "--min-confidence",
        metavar="X",
        help="Label 'unsure' where no class is as probable as X, as 0.5.",
    ),
]
ExpectedPrior = Annotated[
    Literal["folder", "even"] | None,
    typer.Option(
        "--class-prior",
        help="How the images are distributed. folder: as those adapted to; even: each class as likely as another. "
        "Default: what the model was saved with.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Leave out files and folders of this name, or path below IMAGES, as thumbs or '*_mask.png'; as often as "
        "wanted.",
    ),
]
CountLearned = Annotated[
    bool,
    typer.Option("--count-learned", help="Measure images whose labels the model was given, too. Left out by default."),
]
Model = Annotated[Path, typer.Argument(help="A run folder, or its model/.")]
Classes = Annotated[
    str, typer.Option(help="A file with one class name a line, JSON, YAML or CSV; or names with commas between.")
]
Templates = Annotated[Path | None, typer.Option(help="A file with one template a line, {} for the name.")]
BackboneName = Annotated[str | None, typer.Option(help="ARCH/PRETRAINED, ARCH/FILE, hf-hub:NAME or local-dir:PATH.")]
