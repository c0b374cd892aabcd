"""The checks that a single text has to pass: its words, the name of its class, and the texts accepted before it."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from finealign.texts.names import fold

MIN_WORDS = 4
MAX_CHARACTERS = 400

# Words for what a photo cannot show, as regular expressions. English only; see ``non_visual_cue``.
NON_VISUAL = {
    "sound": r"songs?|sings?|singing|chirps?|chirping|barks? (?:loudly|at|when)|barking|voices?|vocali[sz]\w*|sounds?|"
    r"(?:its|their|loud|harsh|shrill) calls?|noisy|melodious|audible",
    "smell": r"smells?|smelling|scents?|scented|odou?rs?|aromas?|fragran\w+",
    "taste": r"tastes?|tasting|tasty|delicious",
    "behaviour": r"behaviou?rs?|behaves?|migrat\w+|feeds on|eats|preys on|hunts|nests in|playful|temperament|"
    r"loyal|intelligent|shy|personality",
    "range": r"native to|endemic|found throughout|(?:its|their|geographic\w*) range(?! of\b)|range extends|"
    r"inhabits?|lives in|rare in",
    "price": r"prices?|priced|costs?|expensive|cheap|affordable|dollars?|euros?",
    "history": r"history|historical\w*|century|centuries|originat\w+|first (?:bred|built|described|produced)|"
    r"introduced (?:to|by)|discovered|dates? back",
    "name origin": r"named (?:after|for)|etymolog\w+",
}
_CUES = {kind: re.compile(rf"\b(?:{words})\b") for kind, words in NON_VISUAL.items()}
# Scripts without spaces between words, by the beginning of ``unicodedata.name``. Two characters count as one word.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
# Typographic apostrophes and dashes become those of a keyboard.
_SAME = str.maketrans({"\u2018": "'", "\u2019": "'"} | {chr(dash): "-" for dash in range(0x2010, 0x2016)})
# Bidirectional classes of control characters, which could make a line read differently on a screen.
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def clean(text: str) -> str:
    """The text in Unicode NFC, stripped, with runs of white space collapsed to one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def has_control(text: str) -> bool:
    """Whether the text holds a control character, a lone surrogate, or a control of the writing direction."""
    return any(
        unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _TURNS
        for character in text
    )


def count_words(text: str) -> int:
    """How many words the text has.

    Words are separated by white space and hold a letter or digit. In scripts without spaces between words, such as
    Chinese and Thai, two characters count as one word.
    """
    unspaced = [unicodedata.name(character, "").startswith(_UNSPACED) for character in text]
    rest = "".join(" " if skip else character for character, skip in zip(text, unspaced, strict=True))
    spaced = sum(any(character.isalnum() for character in word) for word in rest.split())
    return spaced + sum(unspaced) // 2


def _fold(text: str) -> str:
    """``fold``, after typographic apostrophes and dashes are replaced by those of a keyboard."""
    return fold(text.translate(_SAME))


def blanked(text: str, name: str) -> str:
    """The text after ``fold``, with ``{}`` for each mention of the name, including its article and a plural ending."""
    folded = _fold(text)
    parts, position = [], 0
    for start, end in _mentions(folded, _fold(name)):
        parts += [folded[position:start], "{}"]
        position = end
    return re.sub(r"\b(?:an?|the) \{\}", "{}", "".join([*parts, folded[position:]]))


def _mentions(folded: str, name: str) -> list[tuple[int, int]]:
    """The spans (start, end) of the folded text that hold the name, including a plural in s, es or ies.

    A mention must not be part of a longer word. Only digits and scripts with upper and lower case are checked for that,
    because many other scripts put no spaces between words.
    """
    spans = []
    word_end = r"(?![^\W\d_])"
    forms = [rf"{re.escape(name)}(?:e?s{word_end})?"]
    if name.endswith("y"):
        forms.append(rf"{re.escape(name[:-1])}ies{word_end}")
    for mention in re.finditer("|".join(forms), folded):
        start, end = mention.span()
        if not (_joins(folded[start - 1 : start], folded[start]) or _joins(folded[end : end + 1], folded[end - 1])):
            spans.append((start, end))
    return spans


def _joins(neighbour: str, edge: str) -> bool:
    """Whether the character next to a mention (empty at an end of the text) is in one word with the edge of it."""
    return all(character.isdigit() or character.lower() != character.upper() for character in (neighbour or " ", edge))


def names_class(text: str, name: str) -> bool:
    """Whether the text holds the class name. Case, spacing, the kind of dash and a plural ending do not matter."""
    return bool(_mentions(_fold(text), _fold(name)))


def non_visual_cue(text: str, names: Iterable[str] = ()) -> str:
    """The first kind of ``NON_VISUAL`` of which the text holds a word; empty if there is none.

    Words that are part of the given class names do not count. This is a list of English words, not understanding: a
    text that describes a habitat in other words or in another language passes, and one that uses a listed word for
    something visible ("a shy smile") is rejected. It removes obvious mistakes; it does not prove that a text is visual.
    """
    for name in names:
        text = blanked(text, name)
    folded = _fold(text)
    return next((kind for kind, cue in _CUES.items() if cue.search(folded)), "")


def fault(text: str, name: str, *, others: Sequence[str] = ()) -> str:
    """The reason to reject a text that follows from the text alone, worded for the model; empty if there is none.

    ``text`` must come from ``clean``. ``others`` are names of classes that hold a word of ``NON_VISUAL``; that
    word does not count where such a name is mentioned.
    """
    if has_control(text):
        return "holds a control character"
    if count_words(text) < MIN_WORDS:
        return f"is shorter than {MIN_WORDS} words"
    if len(text) > MAX_CHARACTERS:
        return f"is longer than {MAX_CHARACTERS} characters"
    if not names_class(text, name):
        return "does not name the class"
    kind = non_visual_cue(text, [name, *others])
    return f"tells of what cannot be seen ({kind})" if kind else ""


def is_duplicate(text: str, kept: Iterable[str]) -> bool:
    """Whether one of the ``kept`` texts is the same but for case, spacing, and a mark of punctuation at the end."""
    return _bare(text) in {_bare(earlier) for earlier in kept}


def _bare(text: str) -> str:
    return _fold(text).rstrip(".! ")


def is_generic(text: str, name: str, owners: Mapping[str, str]) -> bool:
    """Whether another class has the same text but for the name.

    ``owners`` has the class of each text accepted so far, by its ``generic_form``.
    """
    return owners.get(generic_form(text, name), name) != name


def generic_form(text: str, name: str) -> str:
    """The text as from ``blanked``, without a full stop or exclamation mark at the end."""
    return blanked(text, name).rstrip(".! ")


def judge(
    texts: Sequence[str],
    name: str,
    *,
    others: Sequence[str],
    kept: Sequence[str],
    wanted: int,
    owners: Mapping[str, str],
    beyond_window: Callable[[Sequence[str]], list[bool]],
) -> tuple[list[str], list[tuple[str, str]]]:
    """Check the texts of an answer. Returns the first ``wanted`` that pass, and those rejected, each with its reason.

    ``others`` as for ``fault``; ``kept`` are the texts of the class accepted before; ``owners`` as for ``is_generic``;
    ``beyond_window`` tells for each text whether it is too long for the encoder. At most ``4 * wanted`` texts are
    looked at, because the server decides how long an answer is.
    """
    accepted: list[str] = []
    rejected: list[tuple[str, str]] = []
    for raw in texts[: 4 * wanted]:
        if len(accepted) == wanted:
            break
        text = clean(raw[: 4 * MAX_CHARACTERS])
        reason = fault(text, name, others=others)
        if not reason and beyond_window([text])[0]:
            reason = "is longer than the encoder reads"
        if not reason and is_duplicate(text, [*kept, *accepted]):
            reason = "is a duplicate"
        if not reason and is_generic(text, name, owners):
            reason = "would fit another class as well"
        if reason:
            rejected.append((text[:MAX_CHARACTERS], reason))
        else:
            accepted.append(text)
    return accepted, rejected
