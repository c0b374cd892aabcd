"""What an export is, and what it measured of itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finealign.types import Score

Format = Literal["open_clip", "hf", "onnx"]


@dataclass(frozen=True)
class Measure:
    """The largest difference between the export and FineAlign that was found, and that was allowed."""

    largest: float
    promised: float

    @property
    def kept(self) -> bool:
        """Whether the promise is: not where a value is no number."""
        return self.largest <= self.promised


@dataclass(frozen=True)
class Checked:
    """What an export measured of itself, and what there is to know of it."""

    parity: Mapping[str, Measure]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A checked export."""

    folder: Path
    format: Format
    score: Score
    files: tuple[str, ...]  # relative to the folder, sorted
    parity: Mapping[str, Measure]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "out": str(self.folder),
            "format": self.format,
            "score": self.score,
            "files": list(self.files),
            "bytes": sum((self.folder / name).stat().st_size for name in self.files),
            "parity": {name: asdict(one) for name, one in self.parity.items()},
            "notes": list(self.notes),
        }
