"""What papers report for OpenAI's ViT-B/32: top-1 in percent, each row with its source and how its protocol differs.

Where the source says so, its figures are of the best epoch on the test set, with a learning rate tuned for each data
set. The rows of the grid are of the last epoch, with the same settings for all sets.
"""

from dataclasses import dataclass

from finealign.benchmark.catalogue import DPA_TABLE

BACKBONE = "OpenAI CLIP ViT-B/32"


@dataclass(frozen=True)
class PublishedRow:
    """A method's published top-1 in percent, by the data set's name in the catalogue."""

    method: str
    source: str
    top1: dict[str, float]


def _row(method: str, source: str, *figures: float) -> PublishedRow:
    return PublishedRow(method, source, dict(zip(DPA_TABLE, figures, strict=True)))


_DPA = "arXiv 2408.08855, table of 13 sets; best epoch, learning rate tuned for each set"
PUBLISHED = (
    _row("zero-shot", _DPA, 63.30, 90.69, 44.42, 43.84, 19.50, 82.40, 66.46, 87.50, 61.99, 58.74, 89.80, 65.10, 64.20),
    _row("UPL", _DPA, 58.22, 92.36, 45.37, 51.88, 17.07, 84.25, 67.40, 83.84, 62.12, 49.41, 91.26, 67.41, 62.04),
    _row("POUF", _DPA, 52.20, 94.10, 46.10, 62.90, 18.20, 82.10, 67.80, 87.80, 60.00, 57.70, 90.50, 62.00, 61.20),
    _row("LaFTer", _DPA, 61.63, 94.39, 50.32, 69.96, 19.86, 82.45, 72.43, 84.93, 65.87, 57.44, 94.57, 69.79, 65.08),
    _row("DPA", _DPA, 64.64, 96.06, 55.69, 80.04, 20.67, 84.76, 75.56, 90.71, 68.13, 62.62, 95.97, 76.47, 68.49),
    PublishedRow(
        "GTA-CLIP",
        "arXiv 2501.06031; transductive: adapts on the test images",
        {
            "cub200": 60.48, "fgvc_aircraft": 21.21, "stanford_cars": 64.27, "flowers102": 79.74, "eurosat": 77.38,
            "food101": 81.54, "imagenet": 66.31, "caltech101": 94.16, "dtd": 57.51, "oxford_pets": 90.81,
            "sun397": 70.14, "ucf101": 71.00,
        },
    ),
    PublishedRow(
        "WCA",
        "arXiv 2406.02915; training-free, 60 crops an image",
        {"imagenet": 66.84, "cub200": 56.91, "oxford_pets": 89.89, "dtd": 49.39, "food101": 86.40},
    ),
)  # fmt: skip
