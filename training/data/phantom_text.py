"""Sentences about the synthetic chest and the exact labeller that reads them back.

The grammar is small (fewer than 250 words, at most 14 words a sentence), so that a tiny language model can learn it,
but varied: several wordings per statement, severities, sides, zones, negations and normal statements.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from processing_chex.vocabulary import ANATOMY_NAMES, PHANTOM_CLASSES

from .phantom_anatomy import SIDE_NAMES, Dice
from .phantom_findings import Finding


# Classes that "clear" denies. Fluid and air around the lung are no opacities of the lung itself.
LUNG_CLASSES = ("Atelectasis", "Consolidation", "Edema", "Mass", "Nodule")

_SIZES = ("small", "moderate", "large")
_DEGREES = ("mild", "moderate", "severe")
SEVERITY_WORDS: dict[str, tuple[str, str, str]] = {
    "Atelectasis": _DEGREES,
    "Cardiomegaly": _DEGREES,
    "Consolidation": _DEGREES,
    "Edema": _DEGREES,
    "Mass": _SIZES,
    "Nodule": _SIZES,
    "Pleural effusion": _SIZES,
    "Pneumothorax": _SIZES,
}
_ADVERBS = ("mildly", "moderately", "severely")

_PHRASES: dict[str, tuple[str, ...]] = {
    "Atelectasis": (
        "{sev} atelectasis in the {place}.",
        "{sev} linear atelectasis in the {place}.",
        "There is {sev} atelectasis in the {place}.",
        "{sev} plate-like atelectasis in the {place}.",
    ),
    "Cardiomegaly": (
        "{sev} cardiomegaly.",
        "The heart is {adv} enlarged.",
        "There is {sev} cardiomegaly.",
        "{sev} enlargement of the cardiac silhouette.",
    ),
    "Consolidation": (
        "{sev} consolidation in the {place}.",
        "There is {sev} consolidation in the {place}.",
        "{sev} focal consolidation in the {place}.",
        "{sev} patchy consolidation in the {place}.",
    ),
    "Edema": (
        "{sev} pulmonary edema.",
        "{sev} bilateral pulmonary edema.",
        "There is {sev} pulmonary edema.",
        "{sev} pulmonary edema in both lungs.",
    ),
    "Mass": (
        "{sev} mass in the {place}.",
        "There is a {sev} mass in the {place}.",
        "A {sev} mass is seen in the {place}.",
    ),
    "Nodule": (
        "{sev} nodule in the {place}.",
        "There is a {sev} nodule in the {place}.",
        "A {sev} nodule is seen in the {place}.",
    ),
    "Pleural effusion": (
        "{sev} {side} pleural effusion.",
        "There is a {sev} {side} pleural effusion.",
        "{sev} pleural effusion on the {side}.",
        "A {sev} {side} pleural effusion is present.",
    ),
    "Pneumothorax": (
        "{sev} {side} pneumothorax.",
        "{sev} {side} apical pneumothorax.",
        "There is a {sev} {side} pneumothorax.",
        "{sev} pneumothorax on the {side}.",
    ),
}

# What a finding looks like from one region, where that differs from "<finding> in the <region>".
_REGION_PHRASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("Pleural effusion", "costophrenic angle"): (
        "The {region} is blunted by a {sev} pleural effusion.",
        "Blunting of the {region} by a {sev} pleural effusion.",
    ),
    ("Pleural effusion", "hemidiaphragm"): (
        "The {region} is obscured by a {sev} pleural effusion.",
        "{sev} pleural effusion over the {region}.",
    ),
    ("Pleural effusion", "lower lung zone"): (
        "{sev} pleural effusion at the {side} lung base.",
        "{sev} pleural effusion in the {region}.",
    ),
    ("Pneumothorax", "apical zone"): (
        "{sev} {side} apical pneumothorax.",
        "There is a {sev} pneumothorax in the {region}.",
    ),
    ("Cardiomegaly", "cardiac silhouette"): (
        "The cardiac silhouette is {adv} enlarged.",
        "The heart is {adv} enlarged.",
        "{sev} cardiomegaly.",
    ),
    ("Cardiomegaly", "mediastinum"): (
        "The mediastinum is widened by {sev} cardiomegaly.",
        "{sev} cardiomegaly widens the mediastinum.",
    ),
    ("Edema", "hilar structures"): (
        "The {region} are indistinct from {sev} pulmonary edema.",
        "{sev} edema around the {region}.",
    ),
    ("Mass", "hilar structures"): (
        "The {region} are enlarged by a {sev} mass.",
        "{sev} mass in the {region}.",
    ),
}
_DEFAULT_REGION_PHRASES: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("{sev} atelectasis in the {region}.", "{sev} linear atelectasis in the {region}."),
    "Consolidation": ("{sev} consolidation in the {region}.", "There is {sev} consolidation in the {region}."),
    "Edema": ("{sev} pulmonary edema in the {region}.", "There is {sev} edema in the {region}."),
    "Mass": ("{sev} mass in the {region}.", "There is a {sev} mass in the {region}."),
    "Nodule": ("{sev} nodule in the {region}.", "There is a {sev} nodule in the {region}."),
    "Pleural effusion": ("{sev} {side} pleural effusion.", "There is a {sev} {side} pleural effusion."),
    "Pneumothorax": ("{sev} pneumothorax in the {region}.", "There is a {sev} {side} pneumothorax."),
}

# Normal statements by region, side words removed from the key. A region that is missing here stays undescribed.
_NORMAL_REGION: dict[str, tuple[str, ...]] = {
    "lung": (
        "The {region} is clear.",
        "The {region} is clear and well expanded.",
        "No consolidation, effusion or pneumothorax in the {region}.",
    ),
    "upper lung zone": ("The {region} is clear.", "No nodule or mass in the {region}.", "Clear {region}."),
    "mid lung zone": ("The {region} is clear.", "No focal consolidation in the {region}.", "Clear {region}."),
    "lower lung zone": (
        "The {region} is clear.",
        "No consolidation or atelectasis in the {region}.",
        "Clear {region}.",
    ),
    "hilar structures": ("The {region} are normal.", "The {side} hilum is unremarkable."),
    "apical zone": ("The {region} is clear.", "No {side} apical pneumothorax.", "No pneumothorax in the {region}."),
    "costophrenic angle": (
        "The {region} is sharp.",
        "No blunting of the {region}.",
        "No pleural effusion on the {side}.",
    ),
    "hemidiaphragm": ("The {region} is smooth.", "The {region} is well defined."),
    "trachea": ("The trachea is midline.", "The trachea is normal."),
    "clavicle": ("The {region} is intact.", "No fracture of the {region}."),
    "mediastinum": ("The mediastinum is normal.", "The mediastinum is not widened.", "Normal mediastinal contours."),
    "upper mediastinum": ("The upper mediastinum is normal.",),
    "carina": ("The carina is normal.",),
}
# Regions of which a normal state is often not worth a sentence.
_OFTEN_SILENT = {"upper mediastinum": 0.5, "carina": 0.6, "trachea": 0.2}

_NORMAL_HEART = (
    "The heart size is normal.",
    "Heart size is normal.",
    "The cardiac silhouette is normal.",
    "The heart is not enlarged.",
    "No cardiomegaly.",
)
_BORDERLINE_HEART = ("The heart size is at the upper limit of normal.",)
BORDERLINE_RATIO = 0.478


@lru_cache(maxsize=4096)
def _sentence(template: str, **words: str) -> str:
    text = template.format(**words)
    return text[0].upper() + text[1:]


def place_words(finding: Finding, dice: Dice) -> str:
    """Where a focal finding lies, e.g. "left upper lung zone"."""
    side = SIDE_NAMES[finding.side]
    if finding.zone == "apical":
        return f"{side} apical zone" if dice.chance(0.6) else f"{side} lung apex"
    if finding.zone == "hilar":
        return f"{side} hilar region"
    if finding.zone == "lower" and dice.chance(0.4):
        return f"{side} lung base"
    return f"{side} {finding.zone} lung zone"


def _words(finding: Finding) -> dict[str, str]:
    return {
        "sev": SEVERITY_WORDS[finding.category][finding.severity],
        "adv": _ADVERBS[finding.severity],
        "side": SIDE_NAMES.get(finding.side, "bilateral"),
    }


def finding_phrase(finding: Finding, dice: Dice) -> str:
    """A sentence that names one finding with severity, side and place."""
    template = dice.choice(_PHRASES[finding.category])
    place = place_words(finding, dice) if "{place}" in template else ""
    return _sentence(template, place=place, **_words(finding))


def _base_name(region: str) -> tuple[str, str]:
    side, _, rest = region.partition(" ")
    return (side, rest) if side in ("right", "left") else ("", region)


# (region, side, name without the side) by index.
_REGIONS = [(region, *_base_name(region)) for region in ANATOMY_NAMES]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is visible besides the findings.

    Attributes:
        heart_ratio: Cardiothoracic ratio.
        gastric_bubble: Whether a gastric air bubble is drawn.
        knob_size: Relative size of the aortic knob.
        spine_sway: Lateral curve of the spine.
    """

    heart_ratio: float
    gastric_bubble: bool
    knob_size: float
    spine_sway: float


def region_sentences(index: int, findings: Sequence[Finding], facts: Facts, dice: Dice) -> list[str]:
    """Sentences about one region: its findings, or a normal statement, or nothing for regions rarely described.

    Args:
        index: Index of the region.
        findings: The findings of the image that touch the region.
        facts: What is visible besides the findings.
        dice: Source of the wording.
    """
    region, side, base = _REGIONS[index]
    sentences = []
    for finding in findings:
        words = _words(finding) | {"region": region, "side": side or "bilateral"}
        templates = _REGION_PHRASES.get((finding.category, base)) or _DEFAULT_REGION_PHRASES[finding.category]
        sentence = _sentence(dice.choice(templates), **words)
        if sentence not in sentences:
            sentences.append(sentence)
    if sentences:
        return sentences
    if base == "cardiac silhouette":
        return [_normal_heart(facts, dice)]
    if base == "abdomen":
        if facts.gastric_bubble:
            return ["A gastric air bubble is seen in the abdomen."]
        return [dice.choice(("The abdomen is unremarkable.", "The upper abdomen is normal."))]
    if base == "aortic arch":
        return [_aorta(facts.knob_size)]
    if base == "spine":
        return ["The spine is slightly curved."] if abs(facts.spine_sway) > 0.0075 else ["The spine is unremarkable."]
    if base not in _NORMAL_REGION or dice.chance(_OFTEN_SILENT.get(base, 0.0)):
        return []
    return [_sentence(dice.choice(_NORMAL_REGION[base]), region=region, side=side)]


def _normal_heart(facts: Facts, dice: Dice) -> str:
    return dice.choice(_BORDERLINE_HEART if facts.heart_ratio > BORDERLINE_RATIO else _NORMAL_HEART)


def _aorta(knob: float) -> str:
    return "The aortic arch is prominent." if knob > 1.14 else "The aortic arch is normal."


def report_sentences(findings: Sequence[Finding], phrases: Sequence[str], facts: Facts, dice: Dice) -> list[str]:
    """Report of 3 to 7 sentences: every finding, then denials and normal statements in a usual order.

    Args:
        findings: All findings of the image.
        phrases: The phrase of each finding; half of the report's sentences repeat it, the others reword it.
        facts: What is visible besides the findings.
        dice: Source of the wording.
    """
    present = {finding.category for finding in findings}
    positive: list[str] = []
    for category in PHANTOM_CLASSES:
        group = [index for index, finding in enumerate(findings) if finding.category == category]
        if len(group) == 2 and category in ("Pleural effusion", "Atelectasis", "Consolidation") and dice.chance(0.6):
            positive.append(_bilateral(category, [findings[index] for index in group]))
            continue
        for index in group:
            sentence = phrases[index] if dice.chance(0.5) else finding_phrase(findings[index], dice)
            if sentence not in positive:
                positive.append(sentence)
    heart = []
    if "Cardiomegaly" not in present:
        heart.append(_normal_heart(facts, dice))
    pleura = []
    if "Pleural effusion" not in present and "Pneumothorax" not in present:
        pleura.append(
            dice.choice(
                (
                    "No pleural effusion or pneumothorax.",
                    "There is no pneumothorax or pleural effusion.",
                    "No evidence of pleural effusion or pneumothorax.",
                )
            )
        )
    elif "Pneumothorax" not in present:
        pleura.append(dice.choice(("No pneumothorax.", "There is no pneumothorax.", "No evidence of pneumothorax.")))
    elif "Pleural effusion" not in present:
        pleura.append(
            dice.choice(
                ("No pleural effusion.", "There is no pleural effusion.", "The costophrenic angles are sharp.")
            )
        )
    lungs = _lung_denials(present, dice)
    other = ["No acute bony abnormality.", "The clavicles are intact.", _aorta(facts.knob_size)]
    if "Cardiomegaly" not in present:
        other.append(dice.choice(_NORMAL_REGION["mediastinum"]))
    rest = [other.pop(dice.integer(len(other))) for _ in range(2)]
    # Denials that readers always give come first; what does not fit into the length is left out.
    optional = [*heart, *lungs[:1], *pleura, *lungs[1:], *rest]
    length = min(7, max(3, len(positive) + 1 + dice.integer(4)))
    keep = optional[: max(0, length - len(positive))]
    if dice.chance(0.4):
        return [s for s in keep if s in heart] + positive + [s for s in keep if s not in heart]
    return positive + keep


def _bilateral(category: str, pair: list[Finding]) -> str:
    word = SEVERITY_WORDS[category][max(finding.severity for finding in pair)]
    noun = {"Pleural effusion": "pleural effusions"}.get(category, category.lower())
    return _sentence(f"{word} bilateral {noun}.")


def _lung_denials(present: set[str], dice: Dice) -> list[str]:
    if not present.intersection(LUNG_CLASSES):
        return [dice.choice(("The lungs are clear.", "Both lungs are clear.", "Lungs are clear."))]
    denials = []
    if "Consolidation" not in present:
        denials.append(dice.choice(("No focal consolidation.", "There is no consolidation.")))
    if "Edema" not in present:
        denials.append(dice.choice(("No pulmonary edema.", "There is no pulmonary edema.")))
    if "Mass" not in present and "Nodule" not in present:
        denials.append("No nodule or mass.")
    if "Atelectasis" not in present:
        denials.append("No atelectasis.")
    if len(denials) > 1 and dice.chance(0.5):
        denials.reverse()
    return denials[:2]


# -- labeller --

_TOKENS = re.compile(r"[a-z]+|[.;:!?\n]")
_STEMS = (
    (re.compile(r"atelecta"), "Atelectasis"),
    (re.compile(r"cardiomegal"), "Cardiomegaly"),
    (re.compile(r"consolidat"), "Consolidation"),
    (re.compile(r"o?edema"), "Edema"),
    (re.compile(r"mass(es)?$"), "Mass"),
    (re.compile(r"nodul"), "Nodule"),
    (re.compile(r"effusion"), "Pleural effusion"),
    (re.compile(r"blunt"), "Pleural effusion"),
    (re.compile(r"pneumothora"), "Pneumothorax"),
)
_NEGATIONS = {"no", "not", "without", "free", "negative", "never", "nor", "neither"}
# A new clause ends the reach of a negation. "the" starts one: generated text may lack the full stop before it.
_CLAUSES = {"but", "however", "although", "with", "the", "there"}
_SEEN = {"seen", "present", "identified", "visualized", "visible", "detected", "evident"}
_HEART = {"heart", "cardiac", "cardiomediastinal"}
_AIR_SPACES = {"lung", "lungs", "zone", "zones", "apex", "apices", "base", "bases"}
_KNOWN: dict[str, str | None] = {}


def _class_of(word: str) -> str | None:
    if word not in _KNOWN:
        if len(_KNOWN) > 20000:
            _KNOWN.clear()
        _KNOWN[word] = next((name for stem, name in _STEMS if stem.match(word)), None)
    return _KNOWN[word]


def label_text(text: str) -> dict[str, int]:
    """Read the asserted and denied classes from text.

    Exact for every text of the grammar, and tolerant of free text: case, missing full stops and unknown words do not
    matter. Implicit statements count: "the lungs are clear" denies the five opacities of the lung, "the costophrenic
    angle is sharp" denies an effusion, "the heart is enlarged" asserts cardiomegaly, "heart size is normal" denies it.
    Where a text both asserts and denies a class, the assertion wins.

    Args:
        text: One or several sentences.

    Returns:
        Class name -> 1 (asserted) or 0 (denied), for the mentioned classes only.
    """
    labels: dict[str, int] = {}
    sentence: list[str] = []
    for token in _TOKENS.findall(text.lower()):
        if token.isalpha():
            sentence.append(token)
        elif sentence:
            _label_sentence(sentence, labels)
            sentence = []
    if sentence:
        _label_sentence(sentence, labels)
    return labels


def _label_sentence(words: list[str], labels: dict[str, int]) -> None:
    found: dict[str, int] = {}

    def note(name: str, value: int) -> None:
        found[name] = max(value, found.get(name, 0))

    negated = False
    clause: list[str] = []  # classes asserted since the clause began
    has_heart = not _HEART.isdisjoint(words)
    for position, word in enumerate(words):
        if word in _NEGATIONS:
            negated = True
            following = words[position + 1] if position + 1 < len(words) else ""
            if word == "not" and following in _SEEN:  # "effusion is not seen"
                found.update(dict.fromkeys(clause, 0))
        elif word in ("absent", "resolved", "excluded"):
            found.update(dict.fromkeys(clause, 0))
        elif word in _CLAUSES:
            negated = False
            clause = []
        elif (name := _class_of(word)) is not None:
            note(name, int(not negated))
            clause.append(name)
        elif has_heart and word.startswith("enlarge"):
            note("Cardiomegaly", int(not negated))
        elif has_heart and word in ("normal", "unremarkable"):
            note("Cardiomegaly", 0)
        elif word == "clear" and not negated and not _AIR_SPACES.isdisjoint(words):
            for denied in LUNG_CLASSES:
                note(denied, 0)
        elif word in ("sharp", "clear") and not negated and ("angle" in words or "angles" in words):
            note("Pleural effusion", 0)
    for name, value in found.items():
        labels[name] = max(value, labels.get(name, 0))


def vocabulary() -> set[str]:
    """All lower-case words the grammar can emit."""
    texts: list[str] = list(_NORMAL_HEART + _BORDERLINE_HEART)
    for table in (_PHRASES, _REGION_PHRASES, _DEFAULT_REGION_PHRASES, _NORMAL_REGION):
        for templates in table.values():
            texts += templates
    texts += [*ANATOMY_NAMES, *_ADVERBS, *_SIZES, *_DEGREES, "right left bilateral lung base apex hilar region"]
    texts += ["a gastric air bubble is seen in the abdomen unremarkable upper normal", _aorta(0.0), _aorta(2.0)]
    texts += [
        "the spine is slightly curved no evidence of costophrenic angles acute bony abnormality clavicles intact"
    ]
    texts += ["pleural effusions both lungs"]
    words = re.findall(r"[a-z-]+", re.sub(r"\{\w+\}", " ", " ".join(texts)).lower())
    return set(words)
