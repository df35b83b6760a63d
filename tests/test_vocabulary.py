"""Vocabularies and prompt sets: orders, partners, and every rule and exception of the prompts."""

import pytest

from processing_chex import vocabulary as v
from processing_chex.prompt_sets import anatomy_prompts, class_prompts


def test_sizes_and_uniqueness():
    sizes = {"cig": 53, "chexpert": 14, "mscxr": 8, "nih8": 8, "vindr": 22, "vindr15": 15, "phantom": 8}
    assert {name: len(classes) for name, classes in v.CLASSES_BY_DATASET.items()} == sizes
    for classes in (*v.CLASSES_BY_DATASET.values(), v.ANATOMY_NAMES + v.MULTI_ANATOMY_NAMES):
        assert len(set(classes)) == len(classes)
    assert len(v.ANATOMY_NAMES) == 29


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "right lung"), (7, "right hemidiaphragm"), (14, "left costophrenic angle"), (20, "aortic arch"), (23, "svc")],
)
def test_anatomy_order(index, name):
    assert v.ANATOMY_NAMES[index] == name


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (10, "pleural/parenchymal scarring"),
        (20, "spinal degenerative changes"),
        (30, "vascular redistribution"),
        (40, "cyst/bullae"),
        (43, "pneumonia"),
        (50, "lung cancer"),
        (52, "interstitial lung disease"),
    ],
)
def test_cig_order(index, name):
    assert v.CIG_CLASSES[index] == name


def test_vindr15_is_a_subset_in_order():
    assert v.VINDR15_CLASSES[4] == "Consolidation"
    assert v.VINDR15_CLASSES[-1] == "Other lesion"
    assert [name for name in v.VINDR_CLASSES if name in v.VINDR15_CLASSES] == list(v.VINDR15_CLASSES)


def test_lateral_partners_swap_the_words():
    for index, partner in enumerate(v.LATERAL_PARTNERS):
        assert v.LATERAL_PARTNERS[partner] == index
        name = v.ANATOMY_NAMES[index]
        if partner == index:
            assert "right " not in name.replace("right atrium", "")
            assert not name.startswith("left ")
        else:
            swap = {"right": "left", "left": "right"}
            side, _, rest = name.partition(" ")
            assert v.ANATOMY_NAMES[partner] == f"{swap[side]} {rest}"


def test_multi_regions_pair_partners():
    for name, (right, left) in zip(v.MULTI_ANATOMY_NAMES, v.MULTI_ANATOMY_MEMBERS, strict=True):
        assert v.LATERAL_PARTNERS[right] == left
        base = v.ANATOMY_NAMES[right].removeprefix("right ").replace("mid ", "middle ")
        assert name == f"{base}s"


def test_report_regions():
    names = [v.ANATOMY_NAMES[index] for index in v.REPORT_ANATOMY_INDICES]
    assert len(names) == 15
    assert names[0] == "right upper lung zone"
    assert names[-4:] == ["left clavicle", "mediastinum", "cardiac silhouette", "abdomen"]


def test_qualified_names_are_disjoint():
    names = [
        name
        for dataset in ("cig", "chexpert", "mscxr", "nih8", "vindr", "phantom")
        for name in v.qualified_class_names(dataset)
    ]
    assert len(set(names)) == len(names)
    assert v.qualified_class_names("cig")[42] == "cig/af/clavicle fracture"
    assert v.qualified_class_names("cig")[43] == "cig/disease/pneumonia"
    assert v.qualified_class_names("chexpert")[3] == "cxp/Edema"


def test_unknown_dataset_names_the_known_ones():
    with pytest.raises(ValueError, match="chexpert.*vindr15"):
        class_prompts("padchest")


def test_anatomy_evaluation_prompts():
    prompts = anatomy_prompts(synonyms=False)
    assert list(prompts) == [*v.ANATOMY_NAMES, *v.MULTI_ANATOMY_NAMES]
    assert prompts["right mid lung zone"] == ["Right mid lung zone"]
    assert prompts["svc"] == ["SVC", "Superior vena cava"]
    assert prompts["lungs"] == ["Left and right lungs", "Right and left lungs", "Bilateral"]
    assert prompts["lower lung zones"][-1] == "Bibasilar"
    assert prompts["apical zones"] == ["Left and right apical zones", "Right and left apical zones"]
    assert sum(map(len, prompts.values())) == 28 + 2 + 5 * 2 + 2


def test_anatomy_training_synonyms():
    short, full = anatomy_prompts(synonyms=False), anatomy_prompts(synonyms=True)
    for name, prompts in full.items():
        assert prompts[: len(short[name])] == short[name]
        assert len(set(prompts)) == len(prompts)
    assert full["left mid lung zone"][1:] == ["Left mid lung", "Left middle lung zone", "Left middle lung"]
    assert full["right apical zone"][1:] == ["Right apical lung zone", "Right apical lung", "Right apex"]
    assert full["aortic arch"][1:] == ["Arch of the aorta", "Transverse aortic arch"]
    assert full["cardiac silhouette"] == ["Cardiac silhouette", "Heart"]
    assert full["lower lung zones"][-1] == "Right and left lung bases"
    assert full["right costophrenic angle"] == ["Right costophrenic angle"]


@pytest.mark.parametrize(
    ("dataset", "name", "positive", "negative", "box"),
    [
        ("phantom", "Pleural effusion", "Pleural effusion", "No pleural effusion", "Pleural effusion"),
        ("phantom", "Cardiomegaly", "Cardiomegaly", "No cardiomegaly", "Cardiomegaly"),
        ("cig", "pleural/parenchymal scarring", "Pleural or parenchymal scarring", None, None),
        ("cig", "mass/nodule (not otherwise specified)", None, "No mass or nodule", None),
        ("cig", "copd/emphysema", "COPD or emphysema", "No COPD or emphysema", None),
        ("cig", "normal", "Normal", "Abnormal", None),
        ("chexpert", "Lung Opacity", "Lung opacity", "No lung opacity", "Lung opacity"),
        ("chexpert", "No Finding", "Normal", "Abnormal", None),
        ("chexpert", "Pleural Other", "Pleural pathology", "No pleural pathology", None),
        ("mscxr", "Cardiomegaly", "Cardiomegaly", "No cardiomegaly", "Cardiac silhouette"),
        ("nih8", "Effusion", "Effusion (pleural or other)", "No effusion (pleural or other)", "Pleural effusion"),
        ("nih8", "Nodule", "Nodule", "No nodule", "Lung nodule"),
        ("vindr", "Cardiomegaly", "Cardiomegaly", "No cardiomegaly", "Cardiomegaly"),
        ("vindr15", "ILD", "Interstitial lung disease (ILD)", "No interstitial lung disease (ILD)", None),
        ("vindr15", "Nodule/Mass", "Mass or nodule", "No mass or nodule", "Mass or nodule"),
        ("vindr", "Enlarged PA", "Enlarged pulmonary artery (PA)", "No enlarged pulmonary artery (PA)", None),
        ("vindr", "No finding", "No finding", "Abnormal", None),
    ],
)
def test_class_prompts(dataset, name, positive, negative, box):
    prompts = class_prompts(dataset)
    if positive is not None:
        assert prompts.positive[name] == [positive]
    if negative is not None:
        assert prompts.negative[name] == [negative]
    if box is not None:
        assert prompts.box[name] == [box]


@pytest.mark.parametrize("dataset", sorted(v.CLASSES_BY_DATASET))
def test_every_class_has_one_prompt_of_each_kind(dataset):
    prompts = class_prompts(dataset)
    assert prompts.names == v.CLASSES_BY_DATASET[dataset]
    for table in (prompts.positive, prompts.negative, prompts.box):
        assert list(table) == [*prompts.names, *prompts.prompt_only_names]
        for texts in table.values():
            assert len(texts) == 1
            assert texts[0][0].isupper()
            assert "/" not in texts[0]
