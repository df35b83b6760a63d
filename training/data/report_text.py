"""
Sentences of radiology reports: sections of a report file, deletion of boilerplate, and sentence splitting by rules.

Follows the preparation of MIMIC-CXR reports of the ChEX paper, but needs no model for sentence splitting.
"""

import re

from .sentence_splitting import SentenceSplitter, split_sentences


_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_MISSPELLED = {
    "impression": "conclusion impresson imprression imoression impressoin imprssion impresion imperssion mpression "
    "impession ndication",
    "findings": "finding findins findindgs findgings findngs findnnings finidngs",
}
_EXACT_NAMES = {word: name for name, words in _MISSPELLED.items() for word in words.split()}
_NAME_PARTS = ("impression", "findings", "history", "comparison", "addendum")
_FINDINGS_PARTS = (
    "chest",
    "portable",
    "pa and lateral",
    "lateral and pa",
    "ap and lateral",
    "lateral and ap",
    "frontal and",
    "two views",
    "frontal view",
    "pa view",
    "ap view",
    "one view",
    "lateral view",
    "bone window",
    "frontal upright",
    "frontal semi-upright",
    "ribs",
    "pa and lat",
)

_TITLE_WORDS = (
    "ABDOMEN ABDOMINAL ADDENDUM AND AP BEDSIDE CHEST COMPARISON COMPARISONS CONCLUSION ERECT EXAMINATION FINAL "
    "FINDING FINDINGS FINDNGS FINIDNGS FRONTAL IMAGES IMPRESSION IMPRESSON IN LAT LATERAL NOTE NOTIFICATION OF PA "
    "PATIENT PORTABLE PORTABLES POSITIONS RADIOGRAPH RADIOGRAPHS REPORT SEMI-ERECT SEMI-UPRIGHT SEMIERECT SINGLE "
    "SUPINE TECHNIQUE TECHNOLOGIST'S THE TWO UPPER UPRIGHT VIEW VIEWS WITH"
)
_WORD = rf"(?:{_TITLE_WORDS.replace(' ', '|')})(?![\w-])"
# Matches whole runs, also those without a colon, which are kept: that way each run is read once.
_TITLE = re.compile(rf"(?<![\w-])(?>{_WORD}(?:[ ,/]+{_WORD})*)(:?)")
_BARE_TITLE = re.compile(
    r"\b(?:WET READ VERSION|WET READ|IMPRESSION AP|IMPRESSION|FRONTAL|FINDINGS|FINAL REPORT"
    r"|FINAL ADDENDUM ADDENDUM|FINAL ADDENDUM)\b:?|\bAP,|\bCOMPARISON\."
)
_ENUMERATOR = re.compile(r"(?<!\S)[1-5]\. |#[1-5] ")
_END_OF_WET_READ = re.compile(r"(?<![A-Za-z])[AP]M\b")


def section_name(header: str) -> str:
    """Normalised name of a section, from the text of its header without the colon."""
    name = header.strip().lower()
    if name in _EXACT_NAMES:
        return _EXACT_NAMES[name]
    for part in _NAME_PARTS:
        if part in name:
            return part
    return "findings" if any(part in name for part in _FINDINGS_PARTS) else name


def split_sections(text: str) -> dict[str, str]:
    """
    Sections of a report file by normalised name, in order of appearance.

    A header stands at the beginning of a line after one blank, in capitals, with a colon. What precedes the first one
    is the "preamble"; without any header all is the "full report". Empty findings and impressions are left out; of
    several sections of one name the last is kept.
    """
    text = text.replace("\r\n", "\n")
    header = _HEADER.search(text)
    if header is None:
        return {"full report": text.strip()}
    sections = {"preamble": text[: header.start()].strip()}
    while header is not None:
        # Only headers at line starts count, and the rest of the line of a header is text of that section.
        line_end = text.find("\n", header.end())
        following = _HEADER.search(text, line_end) if line_end >= 0 else None
        name = section_name(header[1])
        content = text[header.end() : following.start() if following else len(text)].strip()
        if content or name not in ("findings", "impression"):
            sections.pop(name, None)
            sections[name] = content
        header = following
    return sections


def _delete_wet_read_stamps(text: str) -> str:
    """Delete from each "WET READ" to the next AM or PM, unless another "WET READ" comes first or none follows."""
    before, *after = text.split("WET READ")
    parts = [before]
    for part in after:
        end = _END_OF_WET_READ.search(part)
        parts.append(part[end.end() :] if end else f"WET READ{part}")
    return "".join(parts)


def _delete_boilerplate(text: str) -> str:
    text = _delete_wet_read_stamps(text)
    text = _TITLE.sub(lambda title: "" if title[1] else title[0], text)
    text = _ENUMERATOR.sub("", _BARE_TITLE.sub("", text))
    return re.sub(r"[ \t]+", " ", text).strip()


def _tidy_sentence(sentence: str) -> str:
    """One line, single blanks, no blank after a full stop, first letter upper-case."""
    sentence = re.sub(r"(?:\. ?)+", ".", " ".join(sentence.split())).strip()
    return sentence[:1].upper() + sentence[1:]


def clean_phrase(text: str) -> str:
    """A phrase of a region without boilerplate, on one line, beginning with a capital; "" if nothing is left."""
    return _tidy_sentence(_delete_boilerplate(text))


def report_sentences(text: str, splitter: SentenceSplitter | None = None) -> list[str]:
    """
    Sentences of the findings, then of the impression of a report file; [] if there are none.

    Sentences of one word and repetitions within a section are left out. `splitter` replaces `split_sentences`.
    """
    sections = split_sections(text)
    sentences = []
    for name in ("findings", "impression"):
        pieces = (splitter or split_sentences)(_delete_boilerplate(sections.get(name, "")))
        tidied = dict.fromkeys(map(_tidy_sentence, pieces))
        sentences += [sentence for sentence in tidied if len(sentence.split()) >= 2]
    return sentences


__all__ = ["SentenceSplitter", "clean_phrase", "report_sentences", "section_name", "split_sections", "split_sentences"]
