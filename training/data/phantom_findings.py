"""Findings of the synthetic chest: which, where, how strong; outlines in the body frame and the regions they touch."""

from dataclasses import dataclass, field

import numpy as np

from processing_chex.vocabulary import ANATOMY_NAMES, PHANTOM_CLASSES

from .phantom_anatomy import BOTH, LEFT, RIGHT, SIDE_NAMES, Body, Dice, Pose, Thorax


NORMAL_SHARE = 0.3
# Chances of one, two or three classes in an abnormal image.
COUNT_CHANCES = (0.25, 0.35, 0.40)

_ANGLES = np.linspace(0.0, 2 * np.pi, 72, endpoint=False)
_DIRECTIONS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)

_INDEX = {name: index for index, name in enumerate(ANATOMY_NAMES)}
_ORDER = {name: index for index, name in enumerate(PHANTOM_CLASSES)}


@dataclass(slots=True)
class Finding:
    """One finding on one side (edema: both sides).

    Attributes:
        category: One of the phantom classes.
        side: -1 right, +1 left, 0 both or none.
        severity: 0 mild or small, 1 moderate, 2 severe or large.
        zone: "apical", "upper", "mid", "lower", "hilar" or "" where it does not apply.
        outlines: One (N, 2) outline in body coordinates (u, v) per box.
        regions: Indices of the anatomy regions that it makes abnormal.
        shape: Numbers for the drawing, by name.
    """

    category: str
    side: int
    severity: int
    zone: str
    outlines: list[np.ndarray]
    regions: frozenset[int]
    shape: dict = field(default_factory=dict)


def _regions(side: int, *names: str) -> set[int]:
    return {_INDEX[f"{SIDE_NAMES[side]} {name}"] for name in names}


class _Chest:
    """Places findings into one thorax, keeping later ones out of fluid and free air."""

    def __init__(self, dice: Dice, body: Body, thorax: Thorax) -> None:
        self.dice, self.body, self.thorax = dice, body, thorax
        self.fluid_top: dict[int, float] = {}
        self.collapse: dict[int, tuple[float, float]] = {}
        self.taken: list[tuple[int, float, float, float]] = []

    def is_free(self, side: int, a: float, v: float, margin: float) -> bool:
        """True if a disc lies in visible, aerated lung and off the other focal findings."""
        if not self.thorax.contains(side, a, v, margin):
            return False
        if side in self.fluid_top and v + margin > self.fluid_top[side]:
            return False
        if side in self.collapse:
            drop, retreat = self.collapse[side]
            if v - margin < self.body.apex_level + drop:
                return False
            if a + margin > float(self.thorax.lateral(side, np.float64(v), drop, retreat)):
                return False
        return all(
            other != side or (a - x) ** 2 + (v - y) ** 2 > (0.8 * (margin + radius)) ** 2
            for other, x, y, radius in self.taken
        )

    def place(self, zones: list[tuple[int, str]], margin: float) -> tuple[int, str, float, float]:
        """Side, zone and centre (a, v) of a focal finding; tries the given (side, zone) pairs in order."""
        thorax, dice = self.thorax, self.dice
        for shrink in (1.0, 0.7, 0.4):
            for side, zone in zones:
                low, high = zone_levels(thorax, side, zone)
                for _ in range(8):
                    v = dice.uniform(low, high)
                    a = dice.uniform(0.06, thorax.widths[side])
                    if self.is_free(side, a, v, shrink * margin):
                        self.taken.append((side, a, v, margin))
                        return side, zone, a, v
        side = zones[0][0]
        v = 0.5 * (thorax.upper_edge[side] + thorax.lower_edge[side])
        return side, "mid", 0.6 * thorax.widths[side], v

    # -- the eight classes --

    def effusion(self, side: int, severity: int) -> Finding:
        """Fluid with a meniscus that rises towards the lateral wall."""
        dice, thorax = self.dice, self.thorax
        height = (dice.uniform(0.045, 0.07), dice.uniform(0.09, 0.15), dice.uniform(0.19, 0.30))[severity]
        edge, level = thorax.corner(side)
        top = level - height
        shape = {
            "top": top,
            "drop": height * dice.uniform(0.22, 0.38),
            "power": dice.uniform(2.5, 5.0),
            "opacity": dice.uniform(0.75, 1.0),
        }
        a = np.linspace(0.03, edge, 90)
        surface = fluid_surface(thorax, side, a, shape)
        floor = np.minimum(thorax.diaphragm(side, a), level)
        inside = (surface < floor) & (thorax.medial(side, surface) <= a) & (thorax.lateral(side, surface) >= a)
        points = np.concatenate(
            [
                np.stack([a[inside], surface[inside]], axis=1),
                np.stack([a[inside], floor[inside]], axis=1),
                [[float(thorax.lateral(side, np.float64(top))), top], [edge, level]],
            ]
        )
        self.fluid_top[side] = top
        regions = _regions(side, "lung", "lower lung zone", "costophrenic angle", "hemidiaphragm")
        if top < thorax.lower_edge[side] - 0.01:
            regions |= _regions(side, "mid lung zone")
        return Finding("Pleural effusion", side, severity, "", [points * (side, 1.0)], frozenset(regions), shape)

    def pneumothorax(self, side: int, severity: int) -> Finding:
        """Air above and beside the lung, bounded by the visceral pleural line."""
        dice, thorax, body = self.dice, self.thorax, self.body
        drop = (dice.uniform(0.035, 0.055), dice.uniform(0.07, 0.105), dice.uniform(0.12, 0.17))[severity]
        retreat = (dice.uniform(0.014, 0.026), dice.uniform(0.04, 0.065), dice.uniform(0.085, 0.13))[severity]
        v = body.apex_level + (thorax.widest - body.apex_level) * np.linspace(0.0, 1.0, 70) ** 1.4
        outer = thorax.lateral(side, v)
        inner = np.where(v < body.apex_level + drop, 0.0, thorax.lateral(side, v, drop, retreat))
        gap = outer - inner
        beside = gap > 0.0055
        end = float(v[beside].max())
        above = v < body.apex_level + drop + 0.02
        points = np.concatenate(
            [
                np.stack([outer[beside], v[beside]], axis=1),
                np.stack([inner[beside & ~above], v[beside & ~above]], axis=1),
                np.stack([thorax.medial(side, v[above]), v[above]], axis=1),
            ]
        )
        self.collapse[side] = (drop, retreat)
        regions = _regions(side, "lung", "apical zone", "upper lung zone")
        if end > thorax.upper_edge[side] + 0.04:
            regions |= _regions(side, "mid lung zone")
        shape = {"drop": drop, "retreat": retreat, "end": end}
        return Finding("Pneumothorax", side, severity, "apical", [points * (side, 1.0)], frozenset(regions), shape)

    def cardiomegaly(self, severity: int) -> Finding:
        """The silhouette itself is drawn by the thorax; this only records its box."""
        thorax = self.thorax
        outline = thorax.heart_outline()
        regions = frozenset({_INDEX["cardiac silhouette"], _INDEX["mediastinum"]})
        return Finding("Cardiomegaly", BOTH, severity, "", [outline], regions)

    def edema(self, severity: int) -> Finding:
        """Perihilar haze and septal lines on both sides."""
        dice, thorax = self.dice, self.thorax
        reach = (dice.uniform(0.10, 0.125), dice.uniform(0.125, 0.15), dice.uniform(0.15, 0.185))[severity]
        strength = (dice.uniform(0.09, 0.12), dice.uniform(0.13, 0.17), dice.uniform(0.19, 0.25))[severity]
        outlines, parts, regions = [], [], set()
        for side in (RIGHT, LEFT):
            centre = (0.115 + 0.35 * reach, thorax.hila[side] + 0.035)
            radii = (reach * dice.uniform(0.95, 1.08), reach * dice.uniform(1.3, 1.5))
            waves = _waves(dice, 0.06)
            outlines.append(_clamped(thorax, side, _star(centre, radii, waves)) * (side, 1.0))
            parts.append({"side": side, "centre": centre, "radii": radii, "waves": waves})
            regions |= _regions(side, "lung", "hilar structures", "mid lung zone", "lower lung zone")
        shape = {"parts": parts, "strength": strength}
        return Finding("Edema", BOTH, severity, "", outlines, frozenset(regions), shape)

    def consolidation(self, zones: list[tuple[int, str]], severity: int) -> Finding:
        """A patchy lobar opacity with a ragged outline."""
        dice = self.dice
        size = (dice.uniform(0.05, 0.065), dice.uniform(0.06, 0.08), dice.uniform(0.075, 0.10))[severity]
        side, zone, a, v = self.place(zones, 0.55 * size)
        radii = (size * dice.uniform(0.85, 1.15), size * dice.uniform(0.9, 1.3))
        waves = _waves(dice, 0.16)
        outline = _clamped(self.thorax, side, _star((a, v), radii, waves), self.fluid_top.get(side))
        strength = (dice.uniform(0.13, 0.18), dice.uniform(0.18, 0.25), dice.uniform(0.26, 0.34))[severity]
        shape = {"side": side, "centre": (a, v), "radii": radii, "waves": waves, "strength": strength}
        regions = frozenset(_regions(side, "lung", f"{zone} lung zone"))
        return Finding("Consolidation", side, severity, zone, [outline * (side, 1.0)], regions, shape)

    def atelectasis(self, zones: list[tuple[int, str]], severity: int) -> Finding:
        """One to three plate-like bands."""
        dice = self.dice
        side, zone, a, v = self.place(zones, 0.045)
        count = severity + 1
        tilt = dice.uniform(-0.45, 0.45)
        gap = dice.uniform(0.022, 0.034)
        bands, points = [], []
        for index in range(count):
            offset = (index - 0.5 * (count - 1)) * gap
            half = dice.uniform(0.05, 0.085)
            thick = dice.uniform(0.006, 0.010)
            angle = tilt + dice.uniform(-0.3, 0.3)
            direction = np.array([np.cos(angle), np.sin(angle)])
            middle = np.array([a + dice.uniform(-0.03, 0.03), v + offset + dice.uniform(-0.006, 0.006)])
            band = middle + np.linspace(-0.94 * half, 0.94 * half, 9)[:, None] * direction
            normal = np.array([-direction[1], direction[0]]) * 1.25 * thick
            points += [band + normal, band - normal]
            bands.append((float(middle[0]), float(middle[1]), float(angle), half, thick, dice.uniform(0.085, 0.15)))
        outline = _clamped(self.thorax, side, np.concatenate(points), self.fluid_top.get(side))
        regions = frozenset(_regions(side, "lung", f"{zone} lung zone"))
        shape = {"side": side, "bands": bands}
        return Finding("Atelectasis", side, severity, zone, [outline * (side, 1.0)], regions, shape)

    def nodule(self, category: str, zones: list[tuple[int, str]], severity: int) -> Finding:
        """A round nodule (diameter 2.5 to 5 % of the film) or a larger, lobulated mass (7 to 14 %)."""
        dice = self.dice
        if category == "Nodule":
            diameter = (dice.uniform(0.025, 0.033), dice.uniform(0.034, 0.041), dice.uniform(0.042, 0.05))[severity]
            waves, strength = _waves(dice, 0.04), dice.uniform(0.14, 0.24)
        else:
            diameter = (dice.uniform(0.07, 0.09), dice.uniform(0.092, 0.115), dice.uniform(0.117, 0.14))[severity]
            waves, strength = _waves(dice, 0.10), dice.uniform(0.16, 0.27)
        radius = 0.5 * diameter
        side, zone, a, v = self.place(zones, radius * (1.15 if category == "Nodule" else 0.9))
        aspect = dice.uniform(0.92, 1.08)
        radii = (radius * aspect, radius / aspect)
        outline = _clamped(self.thorax, side, _star((a, v), radii, waves), self.fluid_top.get(side))
        regions = _regions(side, "lung")
        if zone == "apical":
            regions |= _regions(side, "apical zone", "upper lung zone")
        elif zone == "hilar":
            regions |= _regions(side, "hilar structures", "mid lung zone")
        else:
            regions |= _regions(side, f"{zone} lung zone")
        shape = {"side": side, "centre": (a, v), "radii": radii, "waves": waves, "strength": strength}
        return Finding(category, side, severity, zone, [outline * (side, 1.0)], frozenset(regions), shape)


def zone_levels(thorax: Thorax, side: int, zone: str) -> tuple[float, float]:
    """Range of v in which the centre of a finding of that zone lies."""
    apex, upper, lower = thorax.body.apex_level, thorax.upper_edge[side], thorax.lower_edge[side]
    if zone == "apical":
        return apex + 0.02, thorax.apical_edge
    if zone == "upper":
        return thorax.apical_edge + 0.01, upper - 0.005
    if zone == "mid":
        return upper + 0.005, lower - 0.005
    if zone == "hilar":
        return thorax.hila[side] - 0.03, thorax.hila[side] + 0.03
    return lower + 0.005, thorax.angles[side]


def fluid_surface(thorax: Thorax, side: int, a: np.ndarray, shape: dict) -> np.ndarray:
    """Level of the fluid's surface at distance a from the midline."""
    share = np.clip(a / (thorax.widths[side] - 0.006), 0.0, 1.0)
    return shape["top"] + shape["drop"] * (1.0 - share ** shape["power"])


def radius_factor(angle: np.ndarray, waves: tuple) -> np.ndarray:
    """Relative radius of a star-shaped outline in the given directions."""
    factor = np.ones_like(angle)
    for order, amplitude, phase in waves:
        factor += amplitude * np.cos(order * angle + phase)
    return factor


def _waves(dice: Dice, amplitude: float) -> tuple[tuple[int, float, float], ...]:
    return tuple((order, amplitude * dice.random() * 2 / order, dice.uniform(0.0, 6.283)) for order in (2, 3, 5))


def _star(centre: tuple[float, float], radii: tuple[float, float], waves: tuple) -> np.ndarray:
    return _DIRECTIONS * radius_factor(_ANGLES, waves)[:, None] * radii + centre


def _clamped(thorax: Thorax, side: int, points: np.ndarray, fluid_top: float | None = None) -> np.ndarray:
    """Outline points moved to the border of the lung where they leave it."""
    a, v = points[:, 0], points[:, 1]
    v = np.clip(v, thorax.body.apex_level, None)
    if fluid_top is not None:
        v = np.minimum(v, fluid_top + 0.02)
    v = np.minimum(v, thorax.diaphragm(side, np.clip(a, 0.0, thorax.widths[side])))
    a = np.clip(a, thorax.medial(side, v), thorax.lateral(side, v))
    return np.stack([a, v], axis=1)


def sample_findings(dice: Dice, body: Body, pose: Pose) -> tuple[list[Finding], Thorax]:
    """Draw the findings of a study and the thorax that contains them."""
    chosen: list[str] = []
    if not dice.chance(NORMAL_SHARE):
        draw = dice.random()
        count = 1 if draw < COUNT_CHANCES[0] else 2 if draw < COUNT_CHANCES[0] + COUNT_CHANCES[1] else 3
        pool = list(PHANTOM_CLASSES)
        for _ in range(count):
            chosen.append(pool.pop(dice.integer(len(pool))))
    severities = {name: dice.integer(3) for name in chosen}

    ratio = body.heart_ratio + (0.018 if pose.anteroposterior else 0.0)
    ratio = min(ratio, 0.497)
    if "Cardiomegaly" in chosen:
        level = severities["Cardiomegaly"]
        ratio = (dice.uniform(0.53, 0.565), dice.uniform(0.575, 0.615), dice.uniform(0.62, 0.66))[level]

    sides: dict[str, list[int]] = {}
    for name in chosen:
        first = RIGHT if dice.chance(0.52) else LEFT
        both = name in ("Pleural effusion", "Atelectasis", "Consolidation", "Nodule") and dice.chance(0.25)
        sides[name] = [first, -first] if both else [first]
    raised = {}
    for side in sides.get("Atelectasis", ()):
        raised[side] = dice.uniform(0.0, 0.025)

    thorax = Thorax(body, pose, ratio, raised)
    chest = _Chest(dice, body, thorax)
    findings: list[Finding] = []
    if "Cardiomegaly" in chosen:
        findings.append(chest.cardiomegaly(severities["Cardiomegaly"]))
    # What changes the space of the lung comes first, what needs free lung after it, the smallest last.
    for name in ("Pneumothorax", "Pleural effusion"):
        for side in sides.get(name, ()):
            severity = _vary(dice, severities[name])
            if name == "Pneumothorax":
                findings.append(chest.pneumothorax(side, severity))
            else:
                if side in chest.collapse:
                    severity = min(severity, 1)
                findings.append(chest.effusion(side, severity))
    if "Edema" in chosen:
        findings.append(chest.edema(severities["Edema"]))
    for name in ("Consolidation", "Mass", "Atelectasis", "Nodule"):
        for side in sides.get(name, ()):
            severity = _vary(dice, severities[name])
            zones = _zone_order(dice, name, side)
            if name == "Consolidation":
                findings.append(chest.consolidation(zones, severity))
            elif name == "Atelectasis":
                findings.append(chest.atelectasis(zones, severity))
            else:
                findings.append(chest.nodule(name, zones, severity))
    findings.sort(key=lambda finding: (_ORDER[finding.category], finding.side))
    return findings, thorax


def _vary(dice: Dice, severity: int) -> int:
    """The two sides of one class mostly agree in severity."""
    return dice.integer(3) if dice.chance(0.25) else severity


def _zone_order(dice: Dice, name: str, side: int) -> list[tuple[int, str]]:
    """(side, zone) pairs to try: the drawn zone, other zones of that side, then the other side."""
    if name == "Atelectasis":
        first, options = ("lower" if dice.chance(0.75) else "mid"), ["lower", "mid"]
    elif name == "Consolidation":
        options = ["upper", "mid", "lower"]
        first = options[dice.integer(3)]
    else:
        options = ["upper", "mid", "lower", "hilar" if name == "Mass" else "apical"]
        first = options[dice.integer(4)]
    zones = [first, *(zone for zone in options if zone != first)]
    return [(side, zone) for zone in zones] + [(-side, zone) for zone in zones]
