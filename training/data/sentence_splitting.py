"""
Sentences of radiology reports by rules: no model, no download.

Candidates are full stops, question and exclamation marks, line ends and list numbers; each is decided by the words on
both sides. Time grows linearly with the text.
"""

import re
from collections.abc import Callable


# Splits one text into its sentences. Any callable will do, for example with a stanza pipeline `nlp`:
# `lambda text: [sentence.text for sentence in nlp(text).sentences]`.
SentenceSplitter = Callable[[str], list[str]]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words are lower-case and without a full stop at their end.
# Never the end of a sentence: something always follows.
_TITLES = _words("dr drs mr mrs ms prof st sgt capt")
_NEVER_LAST = _TITLES | _words("vs e.g i.e cf viz fig figs approx ca incl w ph pt pts hx nos")
# The end of a sentence if a capital follows.
_SELDOM_LAST = _words(
    "a.m p.m am pm etc al jr sr resp dept emerg exam max min lat post ant sup inf vol temp staph strep avg est "
    "jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thur thurs fri sat sun "
    "in ft wk wks mo mos yr yrs hr hrs sec mm cm cc ml kg mg"
)
_UNITS = _words("mm cm cc ml kg mg")
# Words that begin a sentence even after an initial ("S.V.C. There"), and in lower case even after an abbreviation.
_STARTERS = _words("the there this these it he she no heart lungs findings patient")
_CAPITAL_STARTERS = _STARTERS | _words(
    "a an all again also as at both bones cardiac chest compared comparison follow-up his her however if in "
    "interval left lung mild moderate new one other right since small stable they unchanged we when"
)
_CONJUNCTIONS = _words("and or but nor vs versus with without than of to")
_ADJECTIVES = _words(
    "underlying known possible probable likely suspected prior previous new mild moderate severe small large minimal "
    "left right bilateral left-sided right-sided"
)
# After one of these a line is not complete; after an adjective it is if the next one begins like a sentence.
_OPEN_WORDS = (
    _CONJUNCTIONS
    | _ADJECTIVES
    | _words(
        "a an the this that these those its his her their our no not any some each both all in on at by for from into "
        "onto over under above below near per via as is are was were be been being has have had may might can could "
        "should would will shall must which who whose where when while if because since until after before during "
        "between within through along across against toward towards beneath behind beyond about around including "
        "measures measuring shows suggests suggesting demonstrates reflects represents status post dr mr mrs ms"
    )
)
_WRAPPED_LINE = 60  # characters: a line this long without a full stop goes on in the next one

# Words that a number belongs to: "rib 2." does not begin the second item of a list.
_NUMBERED = _words("rib ribs grade stage type image segment series day days no")

_CANDIDATE = re.compile(
    r"""(?P<stop>[.?!…](?:(?:[.?!…]|\s+[.!…]|\s+\?(?!\s*[a-z_]))(?!\d))*)(?P<closing>["'”’)\]]*)"""
    r"|(?P<newline>\n)"
    r"|(?<=\s)(?:\(?(?P<item>\d{1,2})\)|\#(?P<hash>\d{1,2})\.?)(?=\s)"
)
_PARENTHESES = re.compile(r"\([^()]{0,300}\)")
_NEXT = re.compile(r"""\s*["'“‘(\[¿¡]*(\S{0,24})""")
_BULLET = re.compile(r"\s*(?:[-–*•+]{1,2}[ \t]|[-–*•+]{1,2}(?=[A-Z_]))")
_LINE_ITEM = re.compile(r"\s*(?:\d{1,2}[.)](?!\d)|\(\d{1,2}\)|#\d)")
_FIRST_ITEM = re.compile(r"\s*(?:[A-Za-z ]{1,24}:\s*)?(?:#(\d{1,2})|\(?(\d{1,2})[.)])(?!\d)")
_DOTTED = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")
_ITEM_MARK = re.compile(r"\(?#?(\d{1,2}|[A-Za-z]|i{1,3}|iv)\)?")


def _word_before(text: str, end: int) -> str:
    """The word that ends at `end`, "" after white space; no more than 24 characters."""
    tail = text[max(0, end - 24) : end]
    return "" if not tail or tail[-1].isspace() else tail.split()[-1]


def _is_line_end(text: str, line_start: int, newline: int) -> bool:
    """Whether the newline, without a full stop before it, ends a sentence rather than wraps a line."""
    before = text[line_start:newline].rstrip()
    if _BULLET.match(text, newline):
        return True
    if not before or before[-1] in ".?!…,:;-–/([&":
        return before[-1:] in (".", "!", "?", "…") and bool(_LINE_ITEM.match(text, newline))
    following = _NEXT.match(text, newline)[1]
    last_word = _word_before(before, len(before)).lower()
    if last_word in _OPEN_WORDS:
        return last_word in _ADJECTIVES and following.istitle() and following.lower() in _STARTERS
    if _LINE_ITEM.match(text, newline):
        return True
    if following[:1].islower() or not (following[:1].isalnum() or following[:1] == "_"):
        return False
    # Lines were wrapped before names and dates became "___".
    return len(before) + 8 * before.count("___") < _WRAPPED_LINE or following.lower() in _STARTERS


def _is_stop(text: str, sentence_start: int, match: re.Match) -> bool:
    """Whether the punctuation ends a sentence, given where the sentence began."""
    stop, word = match["stop"], _word_before(text, match.start())
    bare = word.strip("\"'“”‘’()[],")
    following = _NEXT.match(text, match.end())[1]
    # Not the whole sentence: it may be long, and this is asked at each stop.
    nearby = max(sentence_start, match.start() - 40)
    begins_low = following[:1].islower()
    if not text[match.end()].isspace():
        # A missing blank: "effusion.No", but not "J.R." or "3.5".
        if len(stop) > 1 or bare.lower() in _NEVER_LAST or "." in bare:
            return False
        if re.fullmatch(r"\d{1,2}[.)]", following):
            return len(bare) > 2 and bare.isalpha()
        if not (following.startswith("___") or following[:1].isupper()):
            return False
        return bare.endswith("_") or (len(bare) > 1 and bare[-1].isalnum() and not bare.isdigit())
    if "?" in stop or "!" in stop:
        at_start = not text[nearby : match.start()].strip("\"'“‘([ \t\n")
        return not at_start and word[-1:] not in ("(", "[") and following.lower() not in _CONJUNCTIONS
    if len(stop) > 1 or "…" in stop or match["closing"] or not word:
        return not begins_low
    if _ITEM_MARK.fullmatch(word):
        prefix = text[nearby : match.start() - len(word)].strip(" \t\n-–*•+")
        if not prefix or (prefix.endswith(":") and word.isdigit()):
            return False
    name, first = bare.lower(), following.rstrip(",.;:").lower()
    if name in _NEVER_LAST:
        return False
    if name == "no":
        return not (begins_low or following[:1].isdigit() or following.startswith("_"))
    if len(bare) == 1 and bare.isalpha() or (_DOTTED.fullmatch(bare) and name not in _SELDOM_LAST):
        return first in _CAPITAL_STARTERS and not begins_low
    if name in _SELDOM_LAST:
        if begins_low:
            return first in _STARTERS and "." not in name
        if name in ("a.m", "p.m"):
            return following[:1].isupper() and first not in _TITLES
        return name in _UNITS or not following[:1].isdigit()
    if begins_low:
        is_word = bare.endswith("_") or (len(bare) > 2 and bare.isalpha())
        return first in _STARTERS or (is_word and first not in _CONJUNCTIONS)
    return following[:1] not in (",", ";", ":", "")


def _is_item(text: str, sentence_start: int, position: int, number: str, item: int) -> bool:
    """Whether the number at `position` begins the next item of a list; `item`: number of its last item, 0 for none."""
    before = text[max(sentence_start, position - 26) : position].rstrip()
    word = _word_before(before, len(before)).lower()
    if not before or before[-1] in ",;:-–/(" or word in _OPEN_WORDS or word in _NUMBERED:
        return False
    # A first item in the middle, only after a full stop: "at 3 p.m. 1. No change."
    return int(number) == item + 1 if item else number == "1" and before[-1] in ".?!"


def _split_paragraph(text: str) -> list[str]:
    text = text.strip()
    parentheses = [match.span() for match in _PARENTHESES.finditer(text)][::-1]
    sentences = []
    start = line_start = 0
    first = _FIRST_ITEM.match(text)
    item = int(first[1] or first[2]) if first else 0
    for match in _CANDIDATE.finditer(text):
        if match.end() >= len(text):
            break
        while parentheses and parentheses[-1][1] <= match.start():
            parentheses.pop()
        cut = start
        if parentheses and parentheses[-1][0] < match.start() and match.end() < parentheses[-1][1]:
            pass
        elif match["newline"]:
            if _is_line_end(text, line_start, match.start()):
                cut = match.start()
        elif match["stop"]:
            word = _word_before(text, match.start())
            position = match.start() - len(word)
            is_number = match["stop"] == "." and word.isdecimal() and len(word) <= 2
            following = _NEXT.match(text, match.end())[1]
            if (
                is_number
                and (following[:1].isalpha() or following[:1] == "_")
                and _is_item(text, start, position, word, item)
            ):
                cut = position
            elif _is_stop(text, start, match):
                cut = match.end()
        elif _is_item(text, start, match.start(), match["item"] or match["hash"], item):
            cut = match.start()
        if match["newline"]:
            line_start = match.end()
        if sentence := text[start:cut].strip():
            sentences.append(sentence)
            start = cut
            first = _FIRST_ITEM.match(text, start)
            item = int(first[1] or first[2]) if first else item
    if sentence := text[start:].strip():
        sentences.append(sentence)
    return sentences


def split_sentences(text: str) -> list[str]:
    """
    Sentences of a text, by rules for radiology reports, as they stand in it (line breaks included).

    Blank lines end a sentence, and so do line ends of short lines without a full stop unless the next line goes on.
    Marks of list items stay with their item.
    """
    return [sentence for part in re.split(r"\n[^\S\n]*\n\s*", text) for sentence in _split_paragraph(part)]


__all__ = ["SentenceSplitter", "split_sentences"]
