"""The verbs: ask for descriptions of every class, or fill templates, and write both files."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from finealign.backbone import Backbone
from finealign.describe.alike import alike_pairs, shares_of, shares_with, siblings_of, worst_share
from finealign.describe.checks import clean, generic_form, has_control, judge, non_visual_cue
from finealign.describe.endpoint import Asking, EndpointError, Line, Reply, find_texts
from finealign.describe.record import (
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
from finealign.describe.wording import SYSTEM, contrast, follow_up, opening
from finealign.errors import ConfigError
from finealign.images import display_path
from finealign.progress import Progress, Stage
from finealign.prompts import make_texts

WITHOUT_DESCRIPTIONS = (
    "These are filled templates, not descriptions: they tell the classes apart by their names alone. On six sets of "
    "real photos FAIR ended 2.6 points lower with them in the mean, 12.7 on the set that lost most, none on two; where "
    "the names mean nothing to the backbone, all is lost. Ask an endpoint, or write a few sentences for each class."
)
ENOUGH = 0.5  # the share of the texts asked for that a class does with once its attempts are used up
SILENT_CLASSES = 3  # so many in a row without an answer, and the endpoint counts as down
LOOK = 0.5  # seconds between two looks at whether to stop
LEAVE = 5.0  # seconds that a run which stops waits for what is on its way
SMALL = 1000  # classes; a larger record is saved once a second, not for every class


@dataclass
class _Task:
    """One class being asked for."""

    name: str
    goal: TextSet
    left: int  # requests
    form: int = 0  # place in the endpoint's FORMATS
    problem: str = ""
    rejected: list[tuple[str, str]] = field(default_factory=list)  # of the last answer, each with the reason


class _Asker:
    """Asks for classes, several at once; all but the waiting for answers happens in the caller's thread.

    The record is saved after every class, and of more than 1,000 classes at most once a second: a kill then loses what
    came in that second.
    """

    def __init__(self, line: Line, record: Record, out: Path, backbone: Backbone, progress: Progress) -> None:
        self._line, self._record, self._out = line, record, out
        self._backbone, self._progress = backbone, progress
        self._form: int | None = None  # the response format that this server is known to take
        self._silent = 0  # classes without an answer since the last one
        self._unsaved, self._saved = False, 0.0
        self._telling = [name for name in record.entries if non_visual_cue(name)]
        self._owners = {
            generic_form(text, name): name
            for name, entry in record.entries.items()
            for part in entry.rounds
            for text in part.texts
        }

    def run(self, what: str, goals: Sequence[tuple[str, TextSet]]) -> None:
        """Fill every set, or say in it why that failed. Raises StoppedError, and EndpointError if asking is no use."""
        asking = self._line.asking
        # Those that failed before come last: three of them at the front would end every run.
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
        """What is on its way when asking ends early was paid for: what comes within seconds is kept if it is good."""
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
        prompt, kept = task.goal.prompt, task.goal.texts
        if kept or task.problem:
            missing = self._line.asking.per_class - len(kept)
            prompt = follow_up(prompt, kept=kept, rejected=task.rejected, problem=task.problem, missing=missing)
        settled = self._form is not None
        task.form = task.form if self._form is None else self._form
        retries = max(0, task.left - 1)
        return _begin(lambda: self._line.ask(prompt, task.form, settled=settled, retries=retries))

    def _take(self, task: _Task, reply: Reply, stage: Stage | None) -> bool:
        """Take what came for a class; whether to ask for it again. Raises EndpointError if asking is no use."""
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
                task.left -= reply.requests - 1  # to learn what a server takes costs nothing
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
        wanted = self._line.asking.per_class - len(task.goal.texts)
        task.problem, task.rejected = reply.problem, []
        if reply.problem:
            return
        found = find_texts(reply.content)
        if found is None:
            task.problem = 'it is not a JSON object as {"descriptions": ["a sentence", ...]}'
            return
        accepted, task.rejected = judge(
            [self._line.secrets.scrub(text) for text in found],  # JSON may have spelt one in escapes
            task.name,
            others=self._telling,
            kept=task.goal.texts,
            wanted=wanted,
            owners=self._owners,
            beyond_window=self._backbone.beyond_window,
        )
        task.goal.texts += accepted
        task.goal.rejected += [Rejected(text=text, reason=reason) for text, reason in task.rejected]
        task.goal.done = len(accepted) == wanted
        self._owners |= {generic_form(text, task.name): task.name for text in accepted}
        if not task.goal.done:
            task.problem = f"it held {len(accepted)} descriptions that can be used, and {wanted} were wanted"

    def _close(self, task: _Task) -> None:
        goal, wanted = task.goal, self._line.asking.per_class
        goal.done = goal.done or len(goal.texts) >= max(1, math.ceil(ENOUGH * wanted))
        if not goal.done:
            counted = Counter(one.reason for one in goal.rejected).most_common(3)
            because = "; ".join(f"{times} times a text {reason}" for reason, times in counted)
            goal.failed = "; ".join(part for part in (task.problem, because) if part)

    def _refusal(self, why: str) -> EndpointError:
        done = sum(entry.first.done for entry in self._record.entries.values())
        return EndpointError(
            f"The endpoint {self._line.endpoint} does not serve {self._line.asking.model!r:.100}: {why}. Wanted: an "
            "endpoint that answers, a model it knows, and a key in OPENAI_API_KEY with a quota left. "
            f"{done} of {len(self._record.entries)} classes are in {display_path(record_path(self._out))}; the same "
            "command, without --overwrite, goes on."
        )


def _begin(ask: Callable[[], Reply]) -> Future[Reply]:
    """Ask in a thread of its own that no end of the program waits for: a silent server must not hold it up."""
    future: Future[Reply] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:  # it is the caller's, who asks for the result
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
    """Ask for descriptions of every class and write them to ``out``, with a record beside it.

    Goes on with the record of an earlier run that had the same settings. Classes whose texts the encoder mixes up are
    asked for once more. Raises EndpointError when the endpoint refuses or some class gets too few texts (what is done
    is kept), OutputError when something is there already, StoppedError between two answers, ConfigError and
    PromptError for what cannot be asked, BackboneError for names that the encoder cannot read.
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
        save_record(record, out)  # before anything is paid for: an unwritable place is found now
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
    """Write filled templates where there is no endpoint, in the same two files; the result bears a warning.

    Raises OutputError when something is there already, PromptError for names and templates that cannot be used.
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
    found = clean(domain)
    if not found or len(found) > 200 or has_control(found):
        raise ConfigError(f"The domain {domain!r:.100} is no phrase. Wanted: a few words, as 'bird species'.")
    return found


def _refuse_failed(record: Record, out: Path) -> None:
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
    """Ask again for classes that the encoder mixes up, once; of the two sets the one that is mixed up less is kept."""
    names, entries = list(record.entries), record.entries
    sets = [backbone.encode_sentences(entries[name].first.texts).cpu() for name in names]
    shares = shares_of(sets)
    record.alike_at_first = alike_pairs(shares, names)
    partners: dict[str, str] = {}
    for pair in record.alike_at_first:  # the most mixed up come first
        for name, other in (pair.classes, pair.classes[::-1]):
            partners.setdefault(name, other)
    for name, other in partners.items():
        if entries[name].again is None:
            prompt = contrast(
                name, entries[name].first.texts, other, entries[other].first.texts, domain=domain, count=count
            )
            entries[name].again_beside, entries[name].again = other, TextSet(prompt=prompt)
    goals = [(name, entry.again) for name, entry in entries.items() if entry.again]
    asker.run("telling them apart", [goal for goal in goals if not (goal[1].done or goal[1].failed)])
    for place, entry in enumerate(entries.values()):
        if not entry.again or not entry.again.done:
            continue
        tried = [*sets[:place], backbone.encode_sentences(entry.again.texts).cpu(), *sets[place + 1 :]]
        changed = shares_with(shares, tried, place)
        entry.again_kept = worst_share(changed, place) < worst_share(shares, place)
        if entry.again_kept:
            sets, shares = tried, changed
    record.alike = alike_pairs(shares, names)
