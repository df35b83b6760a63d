"""Writes a small invented download in the exact format of NIH ChestX-ray14."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import PIL.Image


BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)

BOXES = (
    "00099991_000.png,Infiltrate,210.25,500.5,90.25,80.125",
    "00099992_003.png,Mass,100.0,200.0,50.0,60.0",
    "00099991_002.png,Cardiomegaly,300.0,400.0,400.0,300.0",
    "00099992_003.png,Nodule,10.0,20.0,30.0,40.0",
    "00099993_001.png,Effusion,5.0,6.0,7.0,8.0",
    "00099994_000.png,Pneumonia,5.0,6.0,7.0,8.0",
)
# The sizes there are those of the film, not of the image file.
ENTRIES = (
    "00099991_000.png,Infiltration|Edema,0,99991,61,F,PA,2500,2048,0.168,0.168",
    "00099991_001.png,No Finding,1,99991,61,F,PA,2500,2048,0.168,0.168",
    "00099991_002.png,Cardiomegaly,2,99991,62,F,AP,2500,2048,0.168,0.168",
    "00099992_003.png,Mass|Nodule|Pleural_Thickening,3,99992,33,M,AP,2048,2500,0.168,0.168",
    "00099993_001.png,Effusion,1,99993,50,M,PA,2500,2048,0.168,0.168",
    "00099994_000.png,Pneumonia,0,99994,50,M,PA,2500,2048,0.168,0.168",
    "00099995_000.png,Atelectasis|Hernia,0,99995,70,F,AP,2500,2048,0.168,0.168",
    "00099996_000.png,No Finding,0,99996,71,F,PA,2500,2048,0.168,0.168",
)
TRAIN_VAL = ("00099991_000.png", "00099991_001.png", "00099992_003.png", "00099995_000.png")


def write_lines(path: Path, lines: Iterable[str], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + end for line in lines), encoding="utf-8", newline="")
    return path


def write_nih(
    root: Path,
    boxes: Sequence[str] = BOXES,
    entries: Sequence[str] | None = ENTRIES,
    flat: bool = False,
    entry_name: str = "Data_Entry_2017_v2020.csv",
    images: bool = True,
) -> Path:
    """The tree at `root`, with images in one folder (`flat`) or in two of the twelve; gives back the root."""
    write_lines(root / "BBox_List_2017.csv", [BOX_HEADER, *boxes])
    write_lines(root / "train_val_list.txt", TRAIN_VAL)
    if entries is not None:
        write_lines(root / entry_name, [ENTRY_HEADER, *entries])
    if images:
        for number, line in enumerate(ENTRIES):
            folder = root / "images" if flat else root / f"images_{1 + number % 2:03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            # Some of the real files have an alpha channel.
            picture = PIL.Image.new("L", (1024, 1024), 40 + number)
            picture = picture.convert("RGBA") if number == 0 else picture
            picture.save(folder / line.split(",")[0], compress_level=1)
    return root
