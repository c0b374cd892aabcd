"""The prompts that are sent to an endpoint."""

import json
from collections.abc import Iterable, Sequence

from finealign.texts.describe.checks import MIN_WORDS

SYSTEM = (
    "You write visual descriptions of classes for a model that compares photos with sentences. Tell only what can be "
    "seen in one photo: shape, proportions, colours, patterns, texture, parts and their position. Tell nothing of "
    "sound, smell, taste, behaviour, where it is found, price, history or the origin of a name. Each description is "
    f"one plain sentence of {MIN_WORDS} to 30 words that holds the name of the class in the singular, letter for "
    "letter. "
    'Answer with one JSON object and nothing else: {"descriptions": ["a sentence", ...]}.'
)


def opening(name: str, siblings: Sequence[str], *, domain: str, count: int) -> str:
    """The first prompt for a class: it asks for ``count`` descriptions that set the class apart from its siblings."""
    contrasted = (
        f" The classes most like it are: {_quoted(siblings)}. Tell what sets it apart from them." if siblings else ""
    )
    return (
        f"Domain: {domain}. Class: {_quoted([name])}.{contrasted} Write {count} different descriptions, each naming "
        f"{_quoted([name])}."
    )


def contrast(name: str, texts: Sequence[str], other: str, others: Sequence[str], *, domain: str, count: int) -> str:
    """The prompt for a class whose texts the encoder mixes up with those of another class.

    It shows the ``texts`` of the class ``name`` and the texts ``others`` of the class ``other``, and asks for ``count``
    descriptions of what visibly differs.
    """
    return (
        f"Domain: {domain}. These descriptions of {_quoted([name])} and {_quoted([other])} are too much alike.\n"
        f"{name}:\n{_listed(texts)}\n{other}:\n{_listed(others)}\n"
        f"Write {count} different descriptions of {_quoted([name])} alone, each naming it, that tell what visibly "
        f"differs from {_quoted([other])}."
    )


def follow_up(
    prompt: str, *, kept: Sequence[str], rejected: Sequence[tuple[str, str]], problem: str, missing: int
) -> str:
    """The prompt once more, with what was wrong with the last answer and what is still missing.

    ``kept`` are the texts accepted so far, ``rejected`` the rejected texts of the last answer, each with its reason.
    ``problem`` is what was wrong with the answer as a whole, or empty. ``missing`` is how many more texts are needed.
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
