"""Text prompts for anatomy regions and finding classes, as ChEX uses them for training and evaluation.

A region may have several synonyms (training draws one at random, evaluation averages their embeddings); a class has
one positive, one negative and one localisation prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .vocabulary import (
    ANATOMY_NAMES,
    CLASSES_BY_DATASET,
    MULTI_ANATOMY_NAMES,
    VINDR_GLOBAL_CLASSES,
    class_names,
    qualified_class_names,
)


# Further names of a region, used in training only. "{S}" stands for Right or Left.
_SIDED_SYNONYMS: dict[str, tuple[str, ...]] = {
    "upper lung zone": ("{S} upper lung",),
    "mid lung zone": ("{S} mid lung", "{S} middle lung zone", "{S} middle lung"),
    "lower lung zone": ("{S} lower lung",),
    "hilar structures": ("{S} hilar", "{S} hilum", "{S} hilum structures"),
    "apical zone": ("{S} apical lung zone", "{S} apical lung", "{S} apex"),
}
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "trachea": ("Trachea and main bronchi",),
    "spine": ("Thoracic spine", "Lumbar spine", "Thoracic and lumbar spine"),
    "aortic arch": ("Arch of the aorta", "Transverse aortic arch"),
    "upper mediastinum": ("Superior mediastinum",),
    "cardiac silhouette": ("Heart",),
    "abdomen": ("Abdominal",),
    "lungs": ("Lungs",),
    "upper lung zones": ("Upper lung zones", "Upper lungs"),
    "middle lung zones": ("Middle lung zones", "Middle lungs"),
    "lower lung zones": (
        "Lower lung zones",
        "Lower lungs",
        "Lung bases",
        "Left and right lung bases",
        "Right and left lung bases",
    ),
    "apical zones": ("Apical zones", "Apices", "Apex", "Apical lungs", "Apical lung zones"),
}
_EXTRA_MULTI_PROMPTS = {"lungs": ("Bilateral",), "lower lung zones": ("Bibasilar",)}

# (dataset, class) -> (positive, negative, box); None = as the rule says.
_EXCEPTIONS: dict[tuple[str, str], tuple[str | None, str | None, str | None]] = {
    ("cig", "mass/nodule (not otherwise specified)"): (
        "Mass or nodule (not otherwise specified)",
        "No mass or nodule",
        None,
    ),
    ("cig", "copd/emphysema"): ("COPD or emphysema", "No COPD or emphysema", None),
    ("cig", "increased reticular markings/ild pattern"): (
        "Increased reticular markings or ILD pattern",
        "No increased reticular markings or ILD pattern",
        None,
    ),
    ("cig", "normal"): ("Normal", "Abnormal", None),
    ("chexpert", "No Finding"): ("Normal", "Abnormal", None),
    ("chexpert", "Pleural Other"): ("Pleural pathology", "No pleural pathology", None),
    ("mscxr", "Cardiomegaly"): (None, None, "Cardiac silhouette"),
    ("nih8", "Cardiomegaly"): (None, None, "Cardiac silhouette"),
    ("nih8", "Effusion"): ("Effusion (pleural or other)", "No effusion (pleural or other)", "Pleural effusion"),
    ("nih8", "Nodule"): (None, None, "Lung nodule"),
    ("vindr", "Enlarged PA"): ("Enlarged pulmonary artery (PA)", "No enlarged pulmonary artery (PA)", None),
    ("vindr", "ILD"): ("Interstitial lung disease (ILD)", "No interstitial lung disease (ILD)", None),
    ("vindr", "Nodule/Mass"): ("Mass or nodule", "No mass or nodule", None),
    ("vindr", "COPD"): (
        "Chronic obstructive pulmonary disease (COPD)",
        "No chronic obstructive pulmonary disease (COPD)",
        None,
    ),
    ("vindr", "No finding"): ("No finding", "Abnormal", None),
}

# Names that have prompts although they are not classes of the dataset's label vector.
_PROMPT_ONLY_NAMES: dict[str, tuple[str, ...]] = {
    "cig": ("normal",),
    "vindr": VINDR_GLOBAL_CLASSES,
    "vindr15": VINDR_GLOBAL_CLASSES,
}


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one dataset's classes.

    Attributes:
        names: Class names in index order.
        positive: Class name -> prompts that assert it.
        negative: Class name -> prompts that deny it.
        box: Class name -> prompts that localise it.
        prompt_only_names: Further keys of the three dictionaries that are no classes of the label vector (`normal` of
            Chest ImaGenome, the image-level classes of VinDr-CXR).
    """

    names: tuple[str, ...]
    positive: dict[str, list[str]]
    negative: dict[str, list[str]]
    box: dict[str, list[str]]
    prompt_only_names: tuple[str, ...] = ()


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sided(name: str) -> tuple[str, str] | None:
    side, _, rest = name.partition(" ")
    return (side, rest) if side in ("right", "left") else None


def anatomy_prompts(synonyms: bool = False) -> dict[str, list[str]]:
    """Prompts of the 29 regions and, after them, of the 5 two-sided regions, in index order.

    Args:
        synonyms: False gives the evaluation prompts, True adds the synonyms that training draws from.

    Returns:
        Region name -> prompts; the evaluation prompts come first.
    """
    prompts: dict[str, list[str]] = {}
    for name in ANATOMY_NAMES:
        prompts[name] = ["SVC", "Superior vena cava"] if name == "svc" else [_capitalise(name)]
        if synonyms:
            sided = _sided(name)
            if sided is not None:
                templates = _SIDED_SYNONYMS.get(sided[1], ())
                prompts[name] += [template.format(S=_capitalise(sided[0])) for template in templates]
            prompts[name] += _SYNONYMS.get(name, ())
    for name in MULTI_ANATOMY_NAMES:
        prompts[name] = [f"Left and right {name}", f"Right and left {name}", *_EXTRA_MULTI_PROMPTS.get(name, ())]
        if synonyms:
            prompts[name] += _SYNONYMS.get(name, ())
    return prompts


def _rule(name: str) -> tuple[str, str, str]:
    text = name.replace("/", " or ").lower()
    positive = _capitalise(text)
    return positive, f"No {text}", positive


def class_prompts(dataset: str) -> PromptSet:
    """Positive, negative and localisation prompts of a dataset's classes.

    Args:
        dataset: One of `cig`, `chexpert`, `mscxr`, `nih8`, `vindr`, `vindr15`, `phantom`.

    Raises:
        ValueError: If the dataset is unknown; the message lists the known ones.
    """
    names = class_names(dataset)
    extra = _PROMPT_ONLY_NAMES.get(dataset, ())
    family = "vindr" if dataset == "vindr15" else dataset
    positive: dict[str, list[str]] = {}
    negative: dict[str, list[str]] = {}
    box: dict[str, list[str]] = {}
    for name in (*names, *extra):
        rule = _rule(name)
        exception = _EXCEPTIONS.get((family, name), (None, None, None))
        positive[name] = [exception[0] or rule[0]]
        negative[name] = [exception[1] or rule[1]]
        # An exceptional positive prompt also localises unless a localisation prompt is given.
        box[name] = [exception[2] or exception[0] or rule[2]]
    return PromptSet(names=names, positive=positive, negative=negative, box=box, prompt_only_names=extra)


def find_class_set(names: Sequence[str]) -> str:
    """The data set whose classes are `names`, in this order.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    for candidate in CLASSES_BY_DATASET:
        if list(class_names(candidate)) == list(names):
            return candidate
    raise ValueError(
        f"No prompt set has the finding classes {list(names)} of this data set. Known sets: "
        f"{', '.join(CLASSES_BY_DATASET)}; name one with `class_set` if its classes agree in number and order."
    )


def prompts_for_classes(names: Sequence[str]) -> PromptSet:
    """Prompts of the data set that has these classes or, for classes of no known one, those that the rule gives.

    The names of a known data set get its prefix (`cig/af/atelectasis`), so that sets can be mixed.
    """
    try:
        dataset = find_class_set(names)
    except ValueError:
        rules = {name: _rule(name) for name in names}
        return PromptSet(tuple(names), *({name: [rule[kind]] for name, rule in rules.items()} for kind in range(3)))
    prompts, qualified = class_prompts(dataset), qualified_class_names(dataset)
    kinds = (prompts.positive, prompts.negative, prompts.box)
    return PromptSet(qualified, *(dict(zip(qualified, (kind[n] for n in names), strict=True)) for kind in kinds))


def merge_prompt_sets(parts: Sequence[PromptSet]) -> tuple[PromptSet, list[list[int]]]:
    """One set with all classes, a class of several parts once, and for each part where its classes are in it."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    positions = {name: number for number, name in enumerate(names)}
    kinds = (
        {k: v for part in parts for k, v in getattr(part, kind).items()} for kind in ("positive", "negative", "box")
    )
    return PromptSet(names, *kinds), [[positions[name] for name in part.names] for part in parts]


__all__ = [
    "PromptSet",
    "anatomy_prompts",
    "class_prompts",
    "find_class_set",
    "merge_prompt_sets",
    "prompts_for_classes",
]
