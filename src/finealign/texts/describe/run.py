"""Ask an endpoint for descriptions of every class, or fill templates, and write the output and its record."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from finealign.backbone.base import Backbone
from finealign.errors import ConfigError, display_path
from finealign.runtime.progress import Progress, Stage
from finealign.texts.describe.alike import alike_pairs, shares_of, shares_with, siblings_of, worst_share
from finealign.texts.describe.checks import clean, generic_form, has_control, judge, non_visual_cue
from finealign.texts.describe.endpoint import Asking, EndpointError, Line, Reply, find_texts
from finealign.texts.describe.record import (
    Described,
    Entry,
    Record,
    RecordSettings,
    Rejected,
    TextSet,
    begin,
    finish,
    record_path,
    save_record,
)
from finealign.texts.describe.wording import SYSTEM, contrast, follow_up, opening
from finealign.texts.prompts import make_texts

WITHOUT_DESCRIPTIONS = (
    "These are filled templates, not descriptions: they tell the classes apart by their names alone. On six sets of "
    "real photos FAIR ended 2.6 points lower with them in the mean, 12.7 on the set that lost most, none on two; where "
    "the names mean nothing to the backbone, all is lost. Ask an endpoint, or write a few sentences for each class."
)
ENOUGH = 0.5  # the share of the texts asked for that is enough for a class once its attempts are used up
SILENT_CLASSES = 3  # after this many in a row without an answer the endpoint counts as down
LOOK = 0.5  # seconds between two checks whether to stop
LEAVE = 5.0  # seconds that a run which ends early waits for answers to requests already sent
SMALL = 1000  # classes; the record of more is saved at most once a second, not after every class


@dataclass
class _Task:
    """A class for which requests are being made."""

    name: str
    goal: TextSet
    left: int  # requests that may still be made
    form: int = 0  # index in the endpoint's FORMATS
    problem: str = ""  # what was wrong with the last answer
    rejected: list[tuple[str, str]] = field(default_factory=list)  # texts of the last answer, each with the reason


class _Asker:
    """Asks for several classes at the same time. Only the requests run in other threads, all else in the caller's.

    The record is saved after every class. With more than 1,000 classes it is saved at most once a second, so that a
    killed run loses the answers of the last second.
    """

    def __init__(self, line: Line, record: Record, out: Path, backbone: Backbone, progress: Progress) -> None:
        self._line, self._record, self._out = line, record, out
        self._backbone, self._progress = backbone, progress
        self._form: int | None = None  # index of the response format that the server is known to accept
        self._silent = 0  # classes in a row without an answer
        self._unsaved, self._saved = False, 0.0
        # Classes whose names hold a word that would get a text rejected.
        self._telling = [name for name in record.entries if non_visual_cue(name)]
        # The class of each text accepted so far, by the text without the class name.
        self._owners = {
            generic_form(text, name): name
            for name, entry in record.entries.items()
            for text_set in entry.rounds
            for text in text_set.texts
        }

    def run(self, what: str, goals: Sequence[tuple[str, TextSet]]) -> None:
        """Fill every text set with texts, or record in it why that failed. ``what`` is the name of the progress stage.

        Raises StoppedError if the run is stopped, EndpointError if the endpoint is down or refuses every request.
        """
        asking = self._line.asking
        # Classes that failed before come last: SILENT_CLASSES of them at the front would end every run.
        ordered = sorted(goals, key=lambda goal: bool(goal[1].failed))
        waiting = deque(_Task(*goal, left=asking.attempts) for goal in ordered)
        for task in waiting:
            task.goal.failed = ""
        pending: dict[Future[Reply], _Task] = {}
        with self._progress.stage(what, len(waiting)) as stage:
            try:
                while waiting or pending:
                    self._progress.stop_if_asked()
                    while waiting and len(pending) < asking.at_once:
                        task = waiting.popleft()
                        pending[self._submit(task)] = task
                    done, _ = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
                    for future in done:
                        task = pending.pop(future)
                        if self._take(task, future.result(), stage):
                            waiting.appendleft(task)
                    self._save_if_due()
            except Exception:
                self._take_the_rest(pending)
                raise
            finally:
                self._save()

    def _take_the_rest(self, pending: Mapping[Future[Reply], _Task]) -> None:
        """Wait LEAVE seconds for the requests already sent, which are paid for, and keep their good answers."""
        self._line.stop()
        done, _ = wait(pending, timeout=LEAVE)
        for future in done:
            with suppress(EndpointError):
                self._take(pending[future], future.result(), None)

    def _save_if_due(self) -> None:
        due = len(self._record.entries) <= SMALL or time.monotonic() - self._saved >= 1
        if self._unsaved and due:
            self._save()

    def _save(self) -> None:
        save_record(self._record, self._out)
        self._unsaved, self._saved = False, time.monotonic()

    def _submit(self, task: _Task) -> Future[Reply]:
        prompt, accepted = task.goal.prompt, task.goal.texts
        if accepted or task.problem:
            missing = self._line.asking.per_class - len(accepted)
            prompt = follow_up(prompt, kept=accepted, rejected=task.rejected, problem=task.problem, missing=missing)
        settled = self._form is not None
        task.form = task.form if self._form is None else self._form
        retries = max(0, task.left - 1)
        return _begin(lambda: self._line.ask(prompt, task.form, settled=settled, retries=retries))

    def _take(self, task: _Task, reply: Reply, stage: Stage | None) -> bool:
        """Take the reply for a class. Returns whether to ask for the class again.

        Raises EndpointError if the endpoint refuses every request, or is silent for SILENT_CLASSES in a row.
        """
        record = self._record
        record.requests += reply.requests
        record.prompt_tokens += reply.prompt_tokens
        record.completion_tokens += reply.completion_tokens
        if reply.model and reply.model not in record.answered:
            record.answered.append(reply.model)
        match reply.kind:
            case "halted":
                return False
            case "refused":
                raise self._refusal(reply.problem)
            case "limit" | "format":
                task.form += reply.kind == "format"
                task.left -= reply.requests - 1  # learning what the server accepts does not count as an attempt
                return True
            case "answer":
                self._silent = 0
                self._form = task.form if self._form is None and not reply.problem else self._form
                task.left -= reply.requests
                self._digest(task, reply)
            case "silent" | "unfit":
                self._silent += reply.kind == "silent"
                task.left = 0
                task.problem, task.rejected = reply.problem, []
        if not task.goal.done and task.left > 0:
            return True
        self._close(task)
        self._unsaved = True
        self._save_if_due()
        if stage:
            stage.advance(1)
        if self._silent >= SILENT_CLASSES:
            raise self._refusal(f"no answer for {self._silent} classes in a row; the last: {task.problem}")
        return False

    def _digest(self, task: _Task, reply: Reply) -> None:
        """Check the texts of an answer and add the good ones to the class."""
        missing = self._line.asking.per_class - len(task.goal.texts)
        task.problem, task.rejected = reply.problem, []
        if reply.problem:
            return
        texts = find_texts(reply.content)
        if texts is None:
            task.problem = 'it is not a JSON object as {"descriptions": ["a sentence", ...]}'
            return
        accepted, task.rejected = judge(
            [self._line.secrets.scrub(text) for text in texts],  # again: JSON escapes may have hidden a secret
            task.name,
            others=self._telling,
            kept=task.goal.texts,
            wanted=missing,
            owners=self._owners,
            beyond_window=self._backbone.beyond_window,
        )
        task.goal.texts += accepted
        task.goal.rejected += [Rejected(text=text, reason=reason) for text, reason in task.rejected]
        task.goal.done = len(accepted) == missing
        self._owners |= {generic_form(text, task.name): task.name for text in accepted}
        if not task.goal.done:
            task.problem = f"it held {len(accepted)} descriptions that can be used, and {missing} were wanted"

    def _close(self, task: _Task) -> None:
        """Decide whether a class that is not asked for again has enough texts; if not, record why."""
        goal, per_class = task.goal, self._line.asking.per_class
        goal.done = goal.done or len(goal.texts) >= max(1, math.ceil(ENOUGH * per_class))
        if not goal.done:
            counts = Counter(text.reason for text in goal.rejected).most_common(3)
            reasons = "; ".join(f"{times} times a text {reason}" for reason, times in counts)
            goal.failed = "; ".join(part for part in (task.problem, reasons) if part)

    def _refusal(self, why: str) -> EndpointError:
        done = sum(entry.first.done for entry in self._record.entries.values())
        return EndpointError(
            f"The endpoint {self._line.endpoint} does not serve {self._line.asking.model!r:.100}: {why}. Wanted: an "
            "endpoint that answers, a model it knows, and a key in OPENAI_API_KEY with a quota left. "
            f"{done} of {len(self._record.entries)} classes are in {display_path(record_path(self._out))}; the same "
            "command, without --overwrite, goes on."
        )


def _begin(ask: Callable[[], Reply]) -> Future[Reply]:
    """Run ``ask`` in a daemon thread, so that a server that does not answer cannot delay the end of the program."""
    future: Future[Reply] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:  # raised again where the result is read
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def describe(
    classes: Sequence[str],
    *,
    domain: str,
    out: Path,
    backbone: Backbone,
    asking: Asking,
    templates: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Described:
    """Ask an endpoint for descriptions of every class and write them to ``out``, with a record beside it.

    An earlier run with the same settings is resumed from its record, unless ``overwrite`` is set. Classes whose texts
    the encoder mixes up are asked for once more. ``domain`` is a few words for what the classes are, such as "bird
    species". The nearest classes are found with ``templates``, or with the default ones if None. ``progress`` is told
    how far the run is, and may stop it.

    Raises:
        EndpointError: the endpoint refuses or is down, or some class gets too few texts; what is done is kept.
        OutputError: there is a file at ``out`` that may not be replaced, or the files cannot be written.
        StoppedError: the run was stopped; what is done is kept.
        ConfigError: the domain, the key or the endpoint's address cannot be used.
        PromptError: class names or templates cannot be used.
        BackboneError: a class name is too long for the encoder.
        FinealignError: the package openai is not installed.
    """
    progress = progress or Progress()
    texts = make_texts(classes, None, templates)
    names = texts.classes
    domain = _check_domain(domain)
    with closing(Line(asking)) as line:
        settings = RecordSettings(
            source="endpoint",
            classes=list(names),
            domain=domain,
            templates=list(texts.templates),
            per_class=asking.per_class,
            siblings=asking.siblings,
            model=asking.model,
            endpoint=line.endpoint,
            backbone=backbone.identifier,
            system=SYSTEM,
        )
        near = siblings_of(names, backbone, count=asking.siblings, templates=templates)
        entries = {
            name: Entry(
                siblings=list(near[name]),
                first=TextSet(prompt=opening(name, near[name], domain=domain, count=asking.per_class)),
            )
            for name in names
        }
        record = begin(out, settings, entries, overwrite=overwrite)
        if record.finished:
            return finish(record, out)
        save_record(record, out)  # before the first request is paid for, so that an unwritable folder is noticed now
        asker = _Asker(line, record, out, backbone, progress)
        goals = [(name, entry.first) for name, entry in record.entries.items()]
        asker.run("describing classes", [goal for goal in goals if not goal[1].done])
        _refuse_failed(record, out)
        _tell_apart(asker, record, out, backbone, domain=domain, count=asking.per_class)
        return finish(record, out)


def from_templates(
    classes: Sequence[str],
    *,
    domain: str,
    out: Path,
    templates: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Described:
    """Write filled templates to ``out`` without asking an endpoint, with a record beside it; the result has a warning.

    Raises OutputError if there is a file at ``out`` that may not be replaced, or if the files cannot be written;
    ConfigError if the domain cannot be used; PromptError if class names or templates cannot be used.
    """
    texts = make_texts(classes, None, templates)
    settings = RecordSettings(
        source="templates",
        classes=list(texts.classes),
        domain=_check_domain(domain),
        templates=list(texts.templates),
        per_class=len(texts.templates),
    )
    filled = zip(texts.classes, texts.descriptions, strict=True)
    entries = {name: Entry(siblings=[], first=TextSet(texts=list(group), done=True)) for name, group in filled}
    record = begin(out, settings, entries, overwrite=overwrite)
    if not record.finished:
        save_record(record, out)
    return finish(record, out, WITHOUT_DESCRIPTIONS)


def _check_domain(domain: str) -> str:
    cleaned = clean(domain)
    if not cleaned or len(cleaned) > 200 or has_control(cleaned):
        raise ConfigError(f"The domain {domain!r:.100} is no phrase. Wanted: a few words, as 'bird species'.")
    return cleaned


def _refuse_failed(record: Record, out: Path) -> None:
    """Raises EndpointError if a class has too few texts after the first round."""
    failed = [(name, entry.first.failed) for name, entry in record.entries.items() if not entry.first.done]
    if not failed:
        return
    listed = "\n".join(f"  {name!r:.100}: {why}" for name, why in failed[:10])
    more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
    raise EndpointError(
        f"{len(failed)} of {len(record.entries)} classes got too few descriptions that can be used:\n{listed}{more}\n"
        f"The others are in {display_path(record_path(out))}, and {display_path(out)} is not written. The same "
        "command, without --overwrite, asks for those classes again; another model may do better."
    )


def _tell_apart(asker: _Asker, record: Record, out: Path, backbone: Backbone, *, domain: str, count: int) -> None:
    """Ask once more for classes that the encoder mixes up. Of each class's two sets, the less mixed-up one is kept."""
    names, entries = list(record.entries), record.entries
    sets = [backbone.encode_sentences(entries[name].first.texts).cpu() for name in names]
    shares = shares_of(sets)
    record.alike_at_first = alike_pairs(shares, names)
    partners: dict[str, str] = {}
    for pair in record.alike_at_first:  # sorted, so each class gets the partner with which it is mixed up most
        for name, partner in (pair.classes, pair.classes[::-1]):
            partners.setdefault(name, partner)
    for name, partner in partners.items():
        if entries[name].again is None:
            prompt = contrast(
                name, entries[name].first.texts, partner, entries[partner].first.texts, domain=domain, count=count
            )
            entries[name].again_beside, entries[name].again = partner, TextSet(prompt=prompt)
    goals = [(name, entry.again) for name, entry in entries.items() if entry.again]
    asker.run("telling them apart", [goal for goal in goals if not (goal[1].done or goal[1].failed)])
    for place, entry in enumerate(entries.values()):
        if not entry.again or not entry.again.done:
            continue
        new_sets = [*sets[:place], backbone.encode_sentences(entry.again.texts).cpu(), *sets[place + 1 :]]
        new_shares = shares_with(shares, new_sets, place)
        entry.again_kept = worst_share(new_shares, place) < worst_share(shares, place)
        if entry.again_kept:
            sets, shares = new_sets, new_shares
    record.alike = alike_pairs(shares, names)
