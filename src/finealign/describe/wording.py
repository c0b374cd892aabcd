"""What an endpoint is asked, word for word."""

import json
from collections.abc import Iterable, Sequence

from finealign.describe.checks import MIN_WORDS

SYSTEM = (
    "You write visual descriptions of classes for a model that compares photos with sentences. Tell only what can be "
    "seen in one photo: shape, proportions, colours, patterns, texture, parts and their position. Tell nothing of "
    "sound, smell, taste, behaviour, where it is found, price, history or the origin of a name. Each description is "
    f"one plain sentence of {MIN_WORDS} to 30 words that holds the name of the class in the singular, letter for "
    "letter. "
    'Answer with one JSON object and nothing else: {"descriptions": ["a sentence", ...]}.'
)


def opening(name: str, siblings: Sequence[str], *, domain: str, count: int) -> str:
    """The prompt for a class: what tells it from its nearest siblings."""
    near = f" The classes most like it are: {_quoted(siblings)}. Tell what sets it apart from them." if siblings else ""
    return (
        f"Domain: {domain}. Class: {_quoted([name])}.{near} Write {count} different descriptions, each naming "
        f"{_quoted([name])}."
    )


def contrast(name: str, texts: Sequence[str], other: str, others: Sequence[str], *, domain: str, count: int) -> str:
    """The prompt for a class whose texts are mixed up with another's: both, and the wish for what differs."""
    return (
        f"Domain: {domain}. These descriptions of {_quoted([name])} and {_quoted([other])} are too much alike.\n"
        f"{name}:\n{_listed(texts)}\n{other}:\n{_listed(others)}\n"
        f"Write {count} different descriptions of {_quoted([name])} alone, each naming it, that tell what visibly "
        f"differs from {_quoted([other])}."
    )


def follow_up(
    prompt: str, *, kept: Sequence[str], rejected: Sequence[tuple[str, str]], problem: str, missing: int
) -> str:
    """The prompt again, with what was wrong with the last answer and what is still wanted.

    ``rejected``: texts of that answer, each with the reason.
    """
    parts = [prompt]
    if problem:
        parts.append(f"Your last answer could not be used: {problem}.")
    if rejected:
        listed = [f"{text!r:.200}: {reason}" for text, reason in rejected[:10]]
        parts.append(f"Rejected of your last answer:\n{_listed(listed)}")
    if kept:
        parts.append(f"These are kept, do not repeat them:\n{_listed(kept)}\nWrite {missing} more.")
    return "\n".join(parts)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(json.dumps(name, ensure_ascii=False) for name in names)


def _listed(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
