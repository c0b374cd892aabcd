"""The record file beside the output: it holds all prompts and answers, so that an interrupted run can be resumed."""

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

from finealign.errors import OutputError, display_path
from finealign.runtime.atomic import save_text
from finealign.texts.describe.alike import Alike

VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rejected(_Part):
    """A text that failed a check."""

    text: str
    reason: str


class TextSet(_Part):
    """The texts of a class from one round of requests."""

    prompt: str = ""
    texts: list[str] = []
    rejected: list[Rejected] = []
    done: bool = False  # whether there are enough texts
    failed: str = ""  # why there are too few, once the attempts are used up


class Entry(_Part):
    """One class: its texts, and those of a second round if the encoder mixed it up with another class."""

    siblings: list[str]
    first: TextSet
    again_beside: str = ""  # the class with which it is mixed up most
    again: TextSet | None = None  # the second round
    again_kept: bool = False  # whether the texts of the second round replace those of the first

    @property
    def rounds(self) -> list[TextSet]:
        """The text sets of both rounds, or of the first if there was no second."""
        return [self.first, self.again] if self.again else [self.first]

    @property
    def texts(self) -> list[str]:
        """The texts of the round that is used."""
        return self.again.texts if self.again and self.again_kept else self.first.texts


class RecordSettings(_Part):
    """The settings that must be equal for a run to resume the record of an earlier run."""

    source: Literal["endpoint", "templates"]
    classes: list[str]
    domain: str
    templates: list[str]
    per_class: int  # texts asked for
    siblings: int = 0  # nearest classes that a prompt names
    model: str = ""
    endpoint: str = ""
    backbone: str = ""
    system: str = ""  # the system prompt


class Record(_Part):
    """The whole record file."""

    version: int = VERSION
    date: str  # of the start of the first run, ISO 8601 in UTC
    settings: RecordSettings
    answered: list[str] = []  # the names that the answering models gave
    replaces: list[str] = []  # SHA-256 of each output file that the run may overwrite
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: bool = False
    alike_at_first: list[Alike] = []  # classes that are mixed up after the first round
    alike: list[Alike] = []  # classes that are still mixed up at the end
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Described:
    """The result of a run: what was written, and what it cost."""

    out: Path
    record: Path
    classes: tuple[str, ...]
    texts: int  # how many
    requests: int  # of all runs that wrote the record
    prompt_tokens: int
    completion_tokens: int
    rejected: dict[str, int]  # number of texts by the reason they were rejected
    alike_at_first: tuple[Alike, ...]  # mixed up after the first round
    alike: tuple[Alike, ...]  # still mixed up at the end
    warning: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields as values for JSON: paths as strings, and both token counts under "tokens"."""
        fields = asdict(self) | {"out": str(self.out), "record": str(self.record)}
        tokens = {"prompt": fields.pop("prompt_tokens"), "completion": fields.pop("completion_tokens")}
        return fields | {"tokens": tokens}


def record_path(out: Path) -> Path:
    """The path of the record for an output file: ``birds.record.json`` in the same folder as ``birds.json``."""
    return out.with_name(f"{out.stem}.record.json")


def begin(out: Path, settings: RecordSettings, entries: Mapping[str, Entry], *, overwrite: bool) -> Record:
    """The record with which a run starts: the one beside the output if there is one, else a new one.

    With ``overwrite`` the record is always new, and the output that exists now may be replaced. ``entries`` are those
    of a new record. Nothing is written.

    Raises OutputError if ``out`` does not end in .json, if a folder is in the way, if the record cannot be read or has
    other settings, or if there is an output file that this run may not replace.
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
    record = _read_record(path)
    before, now = record.settings.model_dump(), settings.model_dump()
    different = [
        "system (the prompt of another release)" if name == "system" else f"{name} ({old!r:.80}, now {now[name]!r:.80})"
        for name, old in before.items()
        if old != now[name]
    ]
    if different:
        raise OutputError(
            f"{display_path(path)} was made with other settings: {'; '.join(different)}. "
            "Give the same to go on, --out another name, or --overwrite to start again."
        )
    _refuse_stranger(record, out)
    return record


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"{display_path(path)} cannot be read: {error.strerror}. Give --out another name.") from None


def _refuse_stranger(record: Record, out: Path) -> None:
    """Raises OutputError if an output file exists that no run of this record wrote and --overwrite did not cover."""
    if record.finished or not out.exists() or _digest(_read(out)) in record.replaces:
        return
    raise OutputError(
        f"{display_path(out)} is there, and the unfinished {display_path(record_path(out))} did not write it. Move the "
        "first away to go on, or start again with --overwrite."
    )


def _read_record(path: Path) -> Record:
    """Read and check a record. Raises OutputError."""
    shown = display_path(path)
    advice = "Restore it, move it away, or start again with --overwrite."
    try:
        content = path.read_bytes()
        version = _version(content)
        if version not in (None, VERSION):
            raise OutputError(f"{shown} is of version {version!r:.20}. Wanted: version {VERSION}. {advice}")
        record = Record.model_validate_json(content)
    except OSError as error:
        raise OutputError(f"{shown} cannot be read: {error.strerror}. {advice}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise OutputError(f"{shown} is no record of descriptions: {field} {first['msg']}. {advice}") from None
    if list(record.entries) != record.settings.classes:
        raise OutputError(f"{shown} is torn: its entries are not those of its classes. {advice}")
    return record


def _version(content: bytes) -> Any:
    """The version that a record states; None if there is none or the content is not JSON."""
    try:
        parsed = from_json(content)
    except ValueError:
        return None
    return parsed.get("version") if isinstance(parsed, dict) else None


def save_record(record: Record, out: Path) -> None:
    """Write the record beside its output file, atomically. Raises OutputError if it cannot be written."""
    save_text(record.model_dump_json(indent=1) + "\n", record_path(out))


def finish(record: Record, out: Path, warning: str = "") -> Described:
    """Write the descriptions to ``out``, mark the record as finished, and return the result.

    If an earlier run has finished and its output exists, nothing is written. ``warning`` is passed on to the result.
    Raises OutputError if a file has appeared at the output since the run began, or if it cannot be written.
    """
    if not (record.finished and out.exists()):
        _refuse_stranger(record, out)
        texts = {name: entry.texts for name, entry in record.entries.items()}
        content = json.dumps(texts, ensure_ascii=False, indent=1) + "\n"
        if not record.finished:
            record.replaces.append(_digest(content.encode()))
            # The record comes first: if this run ends between the two files, the next one knows the output as its own.
            save_record(record, out)
        save_text(content, out)
    if not record.finished:
        record.finished = True
        save_record(record, out)
    entries = record.entries.values()
    rejected = Counter(text.reason for entry in entries for text_set in entry.rounds for text in text_set.rejected)
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
