"""Texts of reports: sections and their names, deletion of boilerplate, and sentences by rules."""

import runpy
import time
from collections import Counter
from pathlib import Path

import pytest

from training.data.report_text import clean_phrase, report_sentences, section_name, split_sections, split_sentences


BENCHMARK = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "sentence_splitting.py"))
FRAGMENTS = BENCHMARK["load_fragments"]()

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old man with cough.  // Pneumonia?
 
 COMPARISON:  ___.
 
 FINDINGS: 
 
 PA AND LATERAL VIEWS OF THE CHEST:  Heart size is normal.  There is a 10 mm nodule in the
 right upper lobe and a 3.5 cm hiatal hernia.  No pleural effusion. No pleural
 effusion.
 
 IMPRESSION: 
 
 1.  No acute process.
 2.  No pleural effusion.  Unchanged.
 
 NOTIFICATION:  Discussed with Dr. ___ at 9:45 AM.
"""  # noqa: W291, W293


# Whole reports


def test_report_gives_findings_then_impression():
    assert report_sentences(REPORT) == [
        "Heart size is normal.",
        "There is a 10 mm nodule in the right upper lobe and a 3.5 cm hiatal hernia.",
        "No pleural effusion.",
        "No acute process.",
        "No pleural effusion.",
    ]


def test_impression_before_findings_is_still_second():
    assert report_sentences("\n IMPRESSION: Stable chest.\n FINDINGS: Clear lungs.") == [
        "Clear lungs.",
        "Stable chest.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n \n",
        "The lungs are clear.",
        "\n INDICATION: Cough and fever.\n COMPARISON: None available.",
        "\n FINDINGS: \n \n IMPRESSION: \n \n",
        "\n IMPRESSION: Normal.",
    ],
    ids=["empty", "blank", "no header", "other sections", "empty sections", "one word"],
)
def test_reports_without_sentences(text):
    assert report_sentences(text) == []


def test_repetitions_count_after_cleaning_and_within_a_section():
    text = "\n FINDINGS: clear lungs. Clear\n lungs. Clear  lungs.\n IMPRESSION: Clear lungs. No change."
    assert report_sentences(text) == ["Clear lungs.", "Clear lungs.", "No change."]


def test_windows_line_ends_are_the_same():
    assert report_sentences(REPORT.replace("\n", "\r\n")) == report_sentences(REPORT)


def test_any_callable_splits():
    seen = []

    def at_semicolons(text: str) -> list[str]:
        seen.append(text)
        return text.split(";")

    text = "\n FINDINGS: 1. clear lungs; no edema. none\n IMPRESSION: stable"
    assert report_sentences(text, at_semicolons) == ["Clear lungs", "No edema.none"]
    assert seen == ["clear lungs; no edema. none", "stable"]


# Sections


def test_sections_by_name():
    sections = split_sections(REPORT)
    assert list(sections) == [
        "preamble",
        "examination",
        "indication",
        "comparison",
        "findings",
        "impression",
        "notification",
    ]
    assert sections["preamble"] == "FINAL REPORT"
    assert sections["examination"] == "CHEST (PA AND LAT)"
    assert sections["impression"] == "1.  No acute process.\n 2.  No pleural effusion.  Unchanged."


def test_no_header_is_the_full_report():
    assert split_sections(" The lungs: clear. \n") == {"full report": "The lungs: clear."}


@pytest.mark.parametrize(
    "line",
    ["FINDINGS: x", "  FINDINGS: x", " Findings: x", " FINDINGS 2: x", " FINDINGS:x", " THE FINDINGS. NEW: x"],
    ids=["no blank", "two blanks with a name", "lower case", "digit", "no white space", "full stop"],
)
def test_what_is_not_a_header(line):
    # Two blanks are one before the name and one of it.
    expected = {"preamble": "", "findings": "x"} if line.startswith("  ") else {"full report": line.strip()}
    assert split_sections(f"\n{line}\n") == expected


def test_a_header_in_the_first_line_is_not_seen():
    assert list(split_sections(" FINDINGS: Clear.\n IMPRESSION: Normal.")) == ["preamble", "impression"]


def test_a_second_header_on_the_same_line_belongs_to_the_text():
    sections = split_sections("\n FINDINGS: IMPRESSION: Clear lungs.\n COMPARISON: None.")
    assert sections == {"preamble": "", "findings": "IMPRESSION: Clear lungs.", "comparison": "None."}
    assert report_sentences("\n FINDINGS: IMPRESSION: Clear lungs.\n") == ["Clear lungs."]


def test_a_header_right_after_an_empty_header_line_belongs_to_its_text():
    assert split_sections("\n FINDINGS:\n IMPRESSION: Clear lungs.\n") == {
        "preamble": "",
        "findings": "IMPRESSION: Clear lungs.",
    }
    assert list(split_sections("\n FINDINGS: \n IMPRESSION: Clear lungs.\n")) == ["preamble", "impression"]


def test_the_last_section_of_a_name_wins_unless_empty():
    assert split_sections("\n IMPRESSION: a b\n CONCLUSION: c d\n")["impression"] == "c d"
    assert split_sections("\n IMPRESSION: a b\n IMPRESSION: \n \n NOTE: x")["impression"] == "a b"
    assert split_sections("\n CHEST: a b\n FINDINGS: c d")["findings"] == "c d"


def test_only_findings_and_impression_are_removed_when_empty():
    assert split_sections("\n TECHNIQUE: \n \n FINDINGS: \n \n IMPRESSION: \n \n NOTE: x") == {
        "preamble": "",
        "technique": "",
        "note": "x",
    }


IMPRESSION_NAMES = (
    "impression conclusion impresson imprression imoression impressoin imprssion impresion imperssion mpression "
    "impession ndication"
)
FINDINGS_NAMES = "findings finding findins findindgs findgings findngs findnnings finidngs"
FINDINGS_PARTS = [
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
]


@pytest.mark.parametrize("name", IMPRESSION_NAMES.split())
def test_impression_and_its_misspellings(name):
    assert section_name(name.upper()) == "impression"


@pytest.mark.parametrize("name", FINDINGS_NAMES.split())
def test_findings_and_its_misspellings(name):
    assert section_name(f" {name.upper()} ") == "findings"


@pytest.mark.parametrize("part", FINDINGS_PARTS)
def test_names_of_examinations_are_findings(part):
    assert section_name(f"UP {part.upper()}, X") == "findings"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("FINDINGS AND IMPRESSION", "impression"),
        ("CHEST FINDINGS", "findings"),
        ("CLINICAL HISTORY", "history"),
        ("COMPARISONS", "comparison"),
        ("ADDENDUM (CHEST)", "addendum"),
        ("COMPARISON CHEST RADIOGRAPH", "comparison"),
        ("INDICATION", "indication"),
        ("TECHNIQUE", "technique"),
        ("WET READ", "wet read"),
    ],
)
def test_other_names(header, name):
    assert section_name(header) == name


# Boilerplate


@pytest.mark.parametrize(
    "title",
    [
        "PA AND LATERAL VIEWS OF THE CHEST:",
        "AP CHEST:",
        "CHEST, PA AND LATERAL:",
        "CHEST, SINGLE AP PORTABLE VIEW:",
        "FRONTAL/LATERAL RADIOGRAPHS OF THE CHEST:",
        "SEMI-UPRIGHT PORTABLE RADIOGRAPH:",
        "TECHNOLOGIST'S NOTE:",
        "FINIDNGS:",
        "IMPRESSON:",
        "NOTE:",
        "IMPRESSION",
        "IMPRESSION AP",
        "FRONTAL",
        "FINDINGS",
        "FINAL REPORT",
        "FINAL ADDENDUM",
        "FINAL ADDENDUM ADDENDUM",
        "WET READ VERSION",
        "WET READ",
        "WET READ:",
        "AP,",
        "COMPARISON.",
    ],
)
def test_boilerplate_is_deleted_anywhere(title):
    assert clean_phrase(f"{title}  clear lungs") == "Clear lungs"
    assert clean_phrase(f"Clear lungs. {title} no edema") == "Clear lungs.no edema"


@pytest.mark.parametrize(
    "text",
    [
        "Chest: clear lungs",
        "CHEST IS CLEAR",
        "AP VIEW",
        "REVIEW: clear lungs",
        "SPINE: intact",
        "MAP, clear",
        "CHESTS: clear",
    ],
)
def test_what_is_no_boilerplate_stays(text):
    assert clean_phrase(text) == text


@pytest.mark.parametrize("number", range(1, 6))
def test_list_numbers_are_deleted(number):
    assert clean_phrase(f"{number}. clear lungs") == "Clear lungs"
    assert clean_phrase(f"a\n{number}. clear lungs") == "A clear lungs"
    assert clean_phrase(f"#{number} clear lungs") == "Clear lungs"


@pytest.mark.parametrize(
    "text",
    [
        "10 mm nodule",
        "15 cm catheter",
        "3.5 cm mass",
        "8 mm nodule",
        "A nodule of 12 mm",
        "6. clear lungs",
        "11. clear lungs",
        "T1. Clear",
        "Grade #6 fracture",
    ],
)
def test_numbers_that_are_no_list_numbers_stay(text):
    assert clean_phrase(text) == text.replace(". ", ".")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WET READ: ___ ___ 9:45 PM clear lungs", "Clear lungs"),
        ("WET READ VERSION #1 ___ 9:45 AM\n Clear lungs", "Clear lungs"),
        ("No edema. WET READ: A. Bcd 9:45PM Stable", "No edema.Stable"),
        ("WET READ: ___ WET READ: ___ 8:01 AM stable chest", "___ stable chest"),
        ("WET READ: ___ 8:01 AM small WET READ: ___ 9:01 PM effusion", "Small effusion"),
        ("WET READ: EXAM stable", "EXAM stable"),
        ("Discussed at 9:45 AM WET READ ___", "Discussed at 9:45 AM ___"),
    ],
    ids=["stamp", "version", "inside", "first has no stamp", "two stamps", "AM inside a word", "stamp before"],
)
def test_wet_read_stamps(text, expected):
    assert clean_phrase(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("FINDINGS:", ""),
        ("clear\n\n lungs\t here", "Clear lungs here"),
        ("clear. . . ..  lungs", "Clear.lungs"),
        ("No edema . ", "No edema ."),
        ("élargi. Ödem", "Élargi.Ödem"),
        ("3 nodules", "3 nodules"),
        ("1.2 x 0.8 cm", "1.2 x 0.8 cm"),
        ("no PICC line", "No PICC line"),
    ],
)
def test_tidy_phrases(text, expected):
    assert clean_phrase(text) == expected


# Sentences: one example for each rule; | marks the ends


@pytest.mark.parametrize(
    "marked",
    [
        "Clear lungs. |No edema.",
        "clear lungs. |no edema.",
        "Stable on ___. |He left.",
        "Seen by Dr. ___ at ___ a.m. on ___. |No edema.",
        "Opacity vs. Mass. |No edema.",
        "No. 3 is out. |No. |Really no.",
        "Taken at 5 p.m. |The heart is large.",
        "At 5 p.m. Dr. ___ called.",
        "Seen by A. B. Cole. |Fine.",
        "Line in the S.V.C. |There is no kink.",
        "A mass of 3 cm. |No edema.",
        "A 3 cm. mass in 2010. |No edema.",
        "Since Feb. 3 stable. |Old in Feb. |No edema.",
        "Is 3.5 x .8 cm. |No edema.",
        "Tip at T4. |No kink.",
        "From C5. to C7. is fused.",
        "1. Clear. |2. Large heart.",
        "1. Clear lungs |2. Old film",
        "Post-op day 1. |Clear lungs.",
        "1) Clear lungs |2) Large heart",
        "#1 Clear lungs |#2 Large heart",
        "1. Fracture of rib 2. |No edema.",
        "(1) Edema, (2) effusion",
        "Called at 3 p.m. |1. No edema.",
        "Clear lungs.|No edema.|___ is out.",
        "A J.R. Cole, 3.5cm and 2.5Mm.",
        "Mass... |No edema... none.",
        "Edema? |Yes! |No ?edema.",
        "Edema? or mass.",
        "? small mass. |Repeat.",
        "Bases are hazy. |? small effusion. |Repeat.",
        "Bases are hazy. ? |Repeat.",
        "The (small. Very small) mass. |(See below.) |Fine.",
        "The (left mass. |No edema.",
        'It says "no change." |Fine.',
        'Marked "AP." on film.',
        "Clear lungs\n|Large heart",
        "Clear\nlungs and\nCOPD, in\nPlace of Dr.\nCole",
        "Edema on the right\n|No mass",
        "A long line that runs on to the edge and names the left-sided tunneled\nPICC line.",
        "A long line that runs on to the edge and lacks its final full stop here\n|The heart is large.",
        "A line of ___ and ___ and ___ once was much longer than it is\nPICC line.",
        "- Clear lungs\n|- large heart",
        "Clear lungs\n|2. Large heart\n|#3 Mass",
        "Line in the\n\n|no mass",
        "Line \n \t\n |mass",
        "Clear lungs.\n.\n|No edema",
        "Clear. |Heart",
    ],
)
def test_sentence_rules(marked):
    assert split_sentences(marked.replace("|", "")) == [sentence.strip() for sentence in marked.split("|")]


@pytest.mark.parametrize("text", ["", " ", "\n", " \n \n\t"])
def test_nothing_has_no_sentences(text):
    assert split_sentences(text) == []


@pytest.mark.parametrize("text", [".", "...", "?", "1.", "Dr.", "(", ")", "___", "-", "é"])
def test_scraps_are_kept_whole(text):
    assert split_sentences(text) == [text]


@pytest.mark.parametrize("fragment", FRAGMENTS[::3], ids=lambda fragment: fragment["category"])
def test_splitting_loses_and_adds_nothing(fragment):
    assert "".join("".join(split_sentences(fragment["text"])).split()) == "".join(fragment["text"].split())


# Agreement with the fragments


def test_fragments_are_many_and_consistent():
    assert len(FRAGMENTS) >= 300
    halves = Counter(fragment["half"] for fragment in FRAGMENTS)
    assert set(halves) == {"development", "held-out"} and min(halves.values()) > 180
    assert len({fragment["category"] for fragment in FRAGMENTS}) >= 25
    assert len({fragment["text"] for fragment in FRAGMENTS}) == len(FRAGMENTS)
    for fragment in FRAGMENTS:
        assert "".join("".join(fragment["sentences"]).split()) == "".join(fragment["text"].split())


@pytest.mark.parametrize(("half", "exact_floor", "f1_floor"), [("development", 0.98, 0.985), ("held-out", 0.97, 0.98)])
def test_agreement(half, exact_floor, f1_floor):
    fragments = [fragment for fragment in FRAGMENTS if fragment["half"] == half]
    exact, f1, _ = BENCHMARK["agreement"](split_sentences, fragments)
    assert exact >= exact_floor and f1 >= f1_floor
    for naive in (BENCHMARK["split_at_stop_and_blank"], BENCHMARK["split_by_regex"]):
        naive_exact, naive_f1, _ = BENCHMARK["agreement"](naive, fragments)
        assert exact > naive_exact + 0.2 and f1 > naive_f1 + 0.1


# Time


@pytest.mark.parametrize(
    "unit",
    [
        "The heart is normal in size. No effusion.\n",
        "a. ",
        "? or ",
        "Dr. ",
        ". ",
        "(",
        "( . ) ",
        "1. 2) #3 ",
        "\n ",
        " ",
        "x",
        "CHEST ",
        "CHEST, / ",
        "WET READ ",
        "- A\n",
        "A B\n",
        '"',
        "\n A A",
    ],
)
def test_time_is_linear(unit):
    text = unit * (250_000 // len(unit))
    for function in (split_sentences, clean_phrase, report_sentences):
        # All need less than half a second; searches that start over at each place need far longer.
        start = time.process_time()
        function(f"\n FINDINGS: {text}")
        assert time.process_time() - start < 2.5


def test_one_megabyte():
    sentences = split_sentences("The heart is normal in size.\nSeen by Dr. ___ at 3.5 cm. No effusion.  " * 14_000)
    assert len(sentences) == 3 * 14_000
