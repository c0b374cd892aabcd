"""The checks that one text has to pass, told from its words, the name of its class, and the texts kept before."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from finealign.prompts import fold

MIN_WORDS = 4
MAX_CHARACTERS = 400

# A short list of words that tell of what no photo shows. English only; see ``non_visual_cue``.
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
# Their words stand without spaces between them: half a word a character, as ``unicodedata.name`` begins.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_SAME = str.maketrans({"\u2018": "'", "\u2019": "'"} | {chr(dash): "-" for dash in range(0x2010, 0x2016)})
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # they turn the line around on a screen


def clean(text: str) -> str:
    """NFC, with white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def has_control(text: str) -> bool:
    """Whether it holds a control character, half of a character, or one that turns the line around."""
    return any(unicodedata.category(one) in ("Cc", "Cs") or unicodedata.bidirectional(one) in _TURNS for one in text)


def count_words(text: str) -> int:
    """Words by white space; of scripts that set none, such as Chinese and Thai, two characters count as one."""
    unspaced = [unicodedata.name(one, "").startswith(_UNSPACED) for one in text]
    rest = "".join(" " if apart else one for one, apart in zip(text, unspaced, strict=True))
    spaced = sum(any(one.isalnum() for one in word) for word in rest.split())
    return spaced + sum(unspaced) // 2


def _fold(text: str) -> str:
    """``fold``, with curly apostrophes and the dashes of print as those of a keyboard."""
    return fold(text.translate(_SAME))


def blanked(text: str, name: str) -> str:
    """The text after ``fold`` with ``{}`` for each mention of the name, its article and a plural included."""
    folded = _fold(text)
    parts, at = [], 0
    for start, end in _mentions(folded, _fold(name)):
        parts += [folded[at:start], "{}"]
        at = end
    return re.sub(r"\b(?:an?|the) \{\}", "{}", "".join([*parts, folded[at:]]))


def _mentions(folded: str, name: str) -> list[tuple[int, int]]:
    """Where the name stands, a plural in s, es or ies included.

    A mention is no part of a longer word, in scripts that know capitals; others set no spaces between words.
    """
    found = []
    ends = r"(?![^\W\d_])"
    forms = [rf"{re.escape(name)}(?:e?s{ends})?"]
    if name.endswith("y"):
        forms.append(rf"{re.escape(name[:-1])}ies{ends}")
    for mention in re.finditer("|".join(forms), folded):
        start, end = mention.span()
        if not (_joins(folded[start - 1 : start], folded[start]) or _joins(folded[end : end + 1], folded[end - 1])):
            found.append((start, end))
    return found


def _joins(neighbour: str, edge: str) -> bool:
    """Whether two neighbours are of one word."""
    return all(one.isdigit() or one.lower() != one.upper() for one in (neighbour or " ", edge))


def names_class(text: str, name: str) -> bool:
    """Whether the text names the class, but for case, spacing, the kind of dash and a plural."""
    return bool(_mentions(_fold(text), _fold(name)))


def non_visual_cue(text: str, names: Iterable[str] = ()) -> str:
    """Which kind of ``NON_VISUAL`` the text holds a word of; empty if none. Words of the given names do not count.

    A list of English words, not understanding: a text that tells of a habitat in other words, or in another language,
    passes, and one that uses such a word of something visible ("a shy smile") is lost. It is there to keep an
    answer's plain strays out, not to prove that a text is visual.
    """
    for name in names:
        text = blanked(text, name)
    folded = _fold(text)
    return next((kind for kind, cue in _CUES.items() if cue.search(folded)), "")


def fault(text: str, name: str, *, others: Sequence[str] = ()) -> str:
    """The reason against a text that can be told from the text alone, in words for the model; empty if there is none.

    ``text`` is as ``clean`` left it. ``others``: classes whose names hold a word of ``NON_VISUAL``.
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
    """Whether the text is kept already, but for case, spacing and the full stop."""
    return _bare(text) in {_bare(one) for one in kept}


def _bare(text: str) -> str:
    return _fold(text).rstrip(".! ")


def is_generic(text: str, name: str, owners: Mapping[str, str]) -> bool:
    """Whether it is another class's sentence but for the name. ``owners``: class by ``generic_form``."""
    return owners.get(generic_form(text, name), name) != name


def generic_form(text: str, name: str) -> str:
    """What is left of a text without the name of its class."""
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
    """The first ``wanted`` texts that pass every check, and those rejected, each with its reason.

    At most four times as many as wanted are looked at: an answer's length is the server's choice.
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
