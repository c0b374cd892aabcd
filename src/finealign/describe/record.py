"""The record beside the output: all that was asked and answered, so that a run that ended early goes on from it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from finealign.describe.alike import Alike
from finealign.errors import OutputError
from finealign.images import display_path
from finealign.storage import save_text

VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rejected(_Part):
    """A text that failed a check."""

    text: str
    reason: str


class TextSet(_Part):
    """The texts of a class from one round of asking."""

    prompt: str = ""
    texts: list[str] = []
    rejected: list[Rejected] = []
    done: bool = False
    failed: str = ""  # why, when the attempts were used up


class Entry(_Part):
    """One class: its texts, and those of a second round where the encoder mixed it up with another."""

    siblings: list[str]
    first: TextSet
    again_beside: str = ""  # the class it is most mixed up with
    again: TextSet | None = None
    again_kept: bool = False

    @property
    def rounds(self) -> list[TextSet]:
        return [self.first, self.again] if self.again else [self.first]

    @property
    def texts(self) -> list[str]:
        return self.again.texts if self.again and self.again_kept else self.first.texts


class RecordSettings(_Part):
    """What two runs must have in common for one to go on with the other's record."""

    source: Literal["endpoint", "templates"]
    classes: list[str]
    domain: str
    templates: list[str]
    per_class: int
    siblings: int = 0
    model: str = ""
    endpoint: str = ""
    backbone: str = ""
    system: str = ""  # the system prompt


class Record(_Part):
    """The file as a whole."""

    version: int = VERSION
    date: str  # ISO, UTC, of the beginning
    settings: RecordSettings
    answered: list[str] = []  # the models that answered, by the names they gave
    replaces: list[str] = []  # SHA-256 of every file that may lie at the output and be replaced
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: bool = False
    alike_at_first: list[Alike] = []
    alike: list[Alike] = []
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Described:
    """What was written, and what it took."""

    out: Path
    record: Path
    classes: tuple[str, ...]
    texts: int
    requests: int  # of all runs that made the record
    prompt_tokens: int
    completion_tokens: int
    rejected: dict[str, int]  # how many texts by reason
    alike_at_first: tuple[Alike, ...]  # before those classes were asked again
    alike: tuple[Alike, ...]
    warning: str = ""

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"out": str(self.out), "record": str(self.record)}
        tokens = {"prompt": found.pop("prompt_tokens"), "completion": found.pop("completion_tokens")}
        return found | {"tokens": tokens}


def record_path(out: Path) -> Path:
    """Where the record of an output lies: ``birds.record.json`` beside ``birds.json``."""
    return out.with_name(f"{out.stem}.record.json")


def begin(out: Path, settings: RecordSettings, entries: Mapping[str, Entry], *, overwrite: bool) -> Record:
    """The record to go on with: the one beside the output if it has the same settings, else a new one.

    Raises OutputError where something is there that this run may not replace.
    """
    path, shown = record_path(out), display_path(out)
    if out.suffix != ".json":
        raise OutputError(f"Cannot write descriptions to {shown}. Wanted: a file that ends in .json.")
    if out.is_dir() or path.is_dir():
        raise OutputError(f"{shown} or its record is a folder. Give --out another name.")
    fresh = Record(date=datetime.now(UTC).isoformat(timespec="seconds"), settings=settings, entries=dict(entries))
    if overwrite:
        fresh.replaces = [_digest(_read(out))] if out.exists() else []
        return fresh
    if not path.exists():
        if out.exists():
            raise OutputError(
                f"{shown} is there already, without a record to go on with. Give --out another name, or --overwrite."
            )
        return fresh
    found = _read_record(path)
    before, now = found.settings.model_dump(), settings.model_dump()
    differ = [
        "system (the prompt of another release)" if name == "system" else f"{name} ({was!r:.80}, now {now[name]!r:.80})"
        for name, was in before.items()
        if was != now[name]
    ]
    if differ:
        raise OutputError(
            f"{display_path(path)} was made with other settings: {'; '.join(differ)}. "
            "Give the same to go on, --out another name, or --overwrite to start again."
        )
    _refuse_stranger(found, out)
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"{display_path(path)} cannot be read: {error.strerror}. Give --out another name.") from None


def _refuse_stranger(record: Record, out: Path) -> None:
    """Raises OutputError if a file lies at the output that neither this record's runs wrote nor --overwrite named."""
    if record.finished or not out.exists() or _digest(_read(out)) in record.replaces:
        return
    raise OutputError(
        f"{display_path(out)} is there, and the unfinished {display_path(record_path(out))} did not write it. Move the "
        "first away to go on, or start again with --overwrite."
    )


def _read_record(path: Path) -> Record:
    shown = display_path(path)
    advice = "Restore it, move it away, or start again with --overwrite."
    try:
        content = path.read_bytes()
        version = _version(content)
        if version not in (None, VERSION):
            raise OutputError(f"{shown} is of version {version!r:.20}. Wanted: version {VERSION}. {advice}")
        found = Record.model_validate_json(content)
    except OSError as error:
        raise OutputError(f"{shown} cannot be read: {error.strerror}. {advice}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise OutputError(f"{shown} is no record of descriptions: {where} {first['msg']}. {advice}") from None
    if list(found.entries) != found.settings.classes:
        raise OutputError(f"{shown} is torn: its entries are not those of its classes. {advice}")
    return found


def _version(content: bytes) -> Any:
    """The version that a record claims; None if there is none to read."""
    try:
        found = from_json(content)
    except ValueError:
        return None
    return found.get("version") if isinstance(found, dict) else None


def save_record(record: Record, out: Path) -> None:
    """Write the record beside its output. Raises OutputError."""
    save_text(record.model_dump_json(indent=1) + "\n", record_path(out))


def finish(record: Record, out: Path, warning: str = "") -> Described:
    """Write the descriptions, unless a finished run left them, and tell what there is.

    Raises OutputError when a file has come to lie there since the run began.
    """
    if not (record.finished and out.exists()):
        _refuse_stranger(record, out)
        texts = {name: entry.texts for name, entry in record.entries.items()}
        written = json.dumps(texts, ensure_ascii=False, indent=1) + "\n"
        if not record.finished:
            record.replaces.append(_digest(written.encode()))
            save_record(record, out)  # a run that ends between the two files knows the first for its own
        save_text(written, out)
    if not record.finished:
        record.finished = True
        save_record(record, out)
    entries = record.entries.values()
    rejected = Counter(one.reason for entry in entries for part in entry.rounds for one in part.rejected)
    return Described(
        out=out,
        record=record_path(out),
        classes=tuple(record.entries),
        texts=sum(len(entry.texts) for entry in entries),
        requests=record.requests,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        rejected=dict(rejected.most_common()),
        alike_at_first=tuple(record.alike_at_first),
        alike=tuple(record.alike),
        warning=warning,
    )
