"""Names and orders of anatomy regions and finding classes (position in a tuple = index everywhere).

The orders follow the ChEX paper's data: Chest ImaGenome regions and attributes, CheXpert, MS-CXR, NIH ChestX-ray14
(the eight classes with boxes), VinDr-CXR, and the phantom of this project. Names are spelled as in each dataset's
annotation files, without a dataset prefix; `qualified_class_names` adds the prefix that keeps mixed datasets apart.
"""

# Chest ImaGenome, 29 regions. "right" is the patient's right, the left-hand side of a frontal image.
ANATOMY_NAMES: tuple[str, ...] = (
    "right lung",
    "right upper lung zone",
    "right mid lung zone",
    "right lower lung zone",
    "right hilar structures",
    "right apical zone",
    "right costophrenic angle",
    "right hemidiaphragm",
    "left lung",
    "left upper lung zone",
    "left mid lung zone",
    "left lower lung zone",
    "left hilar structures",
    "left apical zone",
    "left costophrenic angle",
    "left hemidiaphragm",
    "trachea",
    "spine",
    "right clavicle",
    "left clavicle",
    "aortic arch",
    "mediastinum",
    "upper mediastinum",
    "svc",
    "cardiac silhouette",
    "cavoatrial junction",
    "right atrium",
    "carina",
    "abdomen",
)

# Queries that ask for both sides at once; appended after the 29 single regions where both are used (indices 29 to 33).
MULTI_ANATOMY_NAMES: tuple[str, ...] = (
    "lungs",
    "upper lung zones",
    "middle lung zones",
    "lower lung zones",
    "apical zones",
)
MULTI_ANATOMY_MEMBERS: tuple[tuple[int, int], ...] = ((0, 8), (1, 9), (2, 10), (3, 11), (5, 13))

# The regions that are described, in this order, when a whole report is generated.
REPORT_ANATOMY_INDICES: tuple[int, ...] = (1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 18, 19, 21, 24, 28)

# Permutation of the 29 regions under a left-right mirror: i <-> i + 8 for the lungs' regions, the clavicles swap, the
# rest stays. `boxes[list(LATERAL_PARTNERS)]` reorders a (29, 4) array.
LATERAL_PARTNERS: tuple[int, ...] = (*range(8, 16), *range(8), 16, 17, 19, 18, *range(20, 29))

# Chest ImaGenome: 43 anatomical findings, then (index 43 on) 10 diseases. Slashes belong to the names.
CIG_CLASSES: tuple[str, ...] = (
    "atelectasis",
    "vascular calcification",
    "vascular congestion",
    "lung opacity",
    "mediastinal displacement",
    "pleural effusion",
    "enlarged cardiac silhouette",
    "rib fracture",
    "hernia",
    "airspace opacity",
    "pleural/parenchymal scarring",
    "enlarged hilum",
    "subcutaneous air",
    "hyperaeration",
    "pulmonary edema/hazy opacity",
    "lung lesion",
    "mass/nodule (not otherwise specified)",
    "tortuous aorta",
    "linear/patchy atelectasis",
    "consolidation",
    "spinal degenerative changes",
    "pneumothorax",
    "calcified nodule",
    "scoliosis",
    "superior mediastinal mass/enlargement",
    "elevated hemidiaphragm",
    "multiple masses/nodules",
    "infiltration",
    "mediastinal widening",
    "shoulder osteoarthritis",
    "vascular redistribution",
    "costophrenic angle blunting",
    "lobar/segmental collapse",
    "hydropneumothorax",
    "spinal fracture",
    "bone lesion",
    "increased reticular markings/ild pattern",
    "pneumomediastinum",
    "diaphragmatic eventration (benign)",
    "sub-diaphragmatic air",
    "cyst/bullae",
    "bronchiectasis",
    "clavicle fracture",
    "pneumonia",
    "pericardial effusion",
    "copd/emphysema",
    "fluid overload/heart failure",
    "granulomatous disease",
    "goiter",
    "aspiration",
    "lung cancer",
    "alveolar hemorrhage",
    "interstitial lung disease",
)
NUM_CIG_FINDINGS = 43

CHEXPERT_CLASSES: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)

MSCXR_CLASSES: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Lung Opacity",
    "Pleural Effusion",
    "Pneumonia",
    "Pneumothorax",
)

NIH8_CLASSES: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
)

# VinDr-CXR: the 22 local classes (with boxes), spelled and capitalised as in the csv files.
VINDR_CLASSES: tuple[str, ...] = (
    "Aortic enlargement",
    "Atelectasis",
    "Cardiomegaly",
    "Calcification",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung cavity",
    "Lung cyst",
    "Lung Opacity",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pulmonary fibrosis",
    "Pneumothorax",
    "Pleural thickening",
    "Pleural effusion",
    "Rib fracture",
    "Other lesion",
)
VINDR15_INDICES: tuple[int, ...] = (0, 1, 2, 3, 5, 9, 10, 13, 14, 15, 16, 17, 18, 19, 21)
VINDR15_CLASSES: tuple[str, ...] = tuple(VINDR_CLASSES[index] for index in VINDR15_INDICES)
# Image-level classes of VinDr-CXR: they have prompts, but no boxes.
VINDR_GLOBAL_CLASSES: tuple[str, ...] = (
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other disease",
    "COPD",
    "No finding",
)

PHANTOM_CLASSES: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Mass",
    "Nodule",
    "Pleural effusion",
    "Pneumothorax",
)

CLASSES_BY_DATASET: dict[str, tuple[str, ...]] = {
    "cig": CIG_CLASSES,
    "chexpert": CHEXPERT_CLASSES,
    "mscxr": MSCXR_CLASSES,
    "nih8": NIH8_CLASSES,
    "vindr": VINDR_CLASSES,
    "vindr15": VINDR15_CLASSES,
    "phantom": PHANTOM_CLASSES,
}

_PREFIXES = {
    "chexpert": "cxp/",
    "mscxr": "mscxr/",
    "nih8": "nih/",
    "vindr": "vindrcxr/",
    "vindr15": "vindrcxr/",
    "phantom": "phantom/",
}


def class_names(dataset: str) -> tuple[str, ...]:
    """Class names of a dataset in index order.

    Args:
        dataset: One of the keys of `CLASSES_BY_DATASET`.

    Raises:
        ValueError: If the dataset is unknown; the message lists the known ones.
    """
    if dataset not in CLASSES_BY_DATASET:
        known = ", ".join(sorted(CLASSES_BY_DATASET))
        raise ValueError(f"Unknown class vocabulary {dataset!r}. Choose one of: {known}.")
    return CLASSES_BY_DATASET[dataset]


def qualified_class_names(dataset: str) -> tuple[str, ...]:
    """Class names with their dataset prefix (`cxp/Edema`, `cig/disease/pneumonia`), unique across datasets.

    Raises:
        ValueError: If the dataset is unknown.
    """
    names = class_names(dataset)
    if dataset == "cig":
        return tuple(
            f"cig/{'af' if index < NUM_CIG_FINDINGS else 'disease'}/{name}" for index, name in enumerate(names)
        )
    return tuple(_PREFIXES[dataset] + name for name in names)


__all__ = [
    "ANATOMY_NAMES",
    "CHEXPERT_CLASSES",
    "CIG_CLASSES",
    "CLASSES_BY_DATASET",
    "LATERAL_PARTNERS",
    "MSCXR_CLASSES",
    "MULTI_ANATOMY_MEMBERS",
    "MULTI_ANATOMY_NAMES",
    "NIH8_CLASSES",
    "NUM_CIG_FINDINGS",
    "PHANTOM_CLASSES",
    "REPORT_ANATOMY_INDICES",
    "VINDR15_CLASSES",
    "VINDR15_INDICES",
    "VINDR_CLASSES",
    "VINDR_GLOBAL_CLASSES",
    "class_names",
    "qualified_class_names",
]
