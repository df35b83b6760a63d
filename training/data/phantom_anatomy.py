"""Geometry of the synthetic chest: curves and outlines in a continuous body frame, independent of any pixel grid.

Body frame: `u` runs from the midline towards the image's right (the patient's left), `v` from the top of the film (0)
to its bottom (1); one unit is the shorter side of the film at zoom 1. A side is -1 (patient's right, image left)
or +1.
Every anatomy box is the hull of an outline of this module, so boxes and drawing come from the same numbers.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from processing_chex.vocabulary import ANATOMY_NAMES


RIGHT, BOTH, LEFT = -1, 0, 1
SIDE_NAMES = {RIGHT: "right", LEFT: "left"}

# Sampling of outlines, and of the curves that placement looks up.
_EVEN = np.linspace(0.0, 1.0, 40)
_DENSE = _EVEN**1.6
_UPPER, _LOWER = np.arange(16) / 16, np.linspace(0.0, 1.0, 24)
_SPINE = np.linspace(-0.02, 1.02, 24)
_GRID = 256
_GRID_LEVELS = np.linspace(0.0, 1.0, _GRID + 1)
_CIRCLE = np.linspace(0.0, 2 * np.pi, 32, endpoint=False)
_UNIT_CIRCLE = np.stack([np.cos(_CIRCLE), np.sin(_CIRCLE)], axis=1)
# Along a clavicle, from the sternal to the acromial end: position, what it rises, its wave, half its thickness.
_SHAFT = np.linspace(0.0, 1.0, 14)
_SHAFT_RISE = _SHAFT**0.8
_SHAFT_WAVE = 0.016 * np.sin(2 * np.pi * _SHAFT * 0.9)
_SHAFT_HALF = 0.0115 + 0.004 * (1.0 - _SHAFT) ** 3 + 0.002 * _SHAFT


class Dice:
    """Buffered uniform random numbers: scalar draws from a NumPy generator cost microseconds, list lookups do not."""

    def __init__(self, rng: np.random.Generator, block: int = 384) -> None:
        self.rng = rng
        self._block = block
        self._values = rng.random(block).tolist()
        self._next = 0

    def random(self) -> float:
        """A float in [0, 1)."""
        if self._next == self._block:
            self._values = self.rng.random(self._block).tolist()
            self._next = 0
        value = self._values[self._next]
        self._next += 1
        return value

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random() < probability

    def integer(self, high: int) -> int:
        """An integer in [0, high)."""
        return int(self.random() * high)

    def choice(self, options):
        """One element of a sequence."""
        return options[int(self.random() * len(options))]

    def bell(self, low: float, high: float) -> float:
        """A float in [low, high), values near the middle being more likely (mean of three uniform draws)."""
        return low + (high - low) * (self.random() + self.random() + self.random()) / 3.0


@dataclass(slots=True)
class Body:
    """What belongs to a person and stays the same in all studies of that person."""

    female: bool
    breast_size: float
    breast_level: float
    breast_spread: float
    half_width: float  # inner half width of the rib cage at its widest level
    width_asymmetry: float
    apex_level: float
    apex_offset: float  # distance of the apex from the midline
    apex_fullness: float
    dome_level: float  # right dome in full inspiration
    dome_difference: float  # how much lower the left dome stands
    angle_depth: float  # from dome to costophrenic angle
    dome_position: float
    dome_power: float
    wall: float  # thickness of the soft tissue of the chest wall
    heart_ratio: float  # cardiothoracic ratio without disease
    heart_right_share: float
    knob_size: float
    knob_level: float
    carina_level: float
    hilum_level: float
    spine_sway: float
    spine_phase: float
    rib_first: float
    rib_spacing: float
    rib_growth: float
    rib_width: float
    rib_slope: float
    anterior_slope: float
    anterior_shift: float
    clavicle_level: float
    clavicle_rise: float
    shoulder_level: float
    bone_density: float
    vessel_density: float
    seed: int  # for fine structure (vessels, ribs)


def sample_body(dice: Dice) -> Body:
    """Draw a person."""
    female = dice.chance(0.48)
    return Body(
        female=female,
        breast_size=dice.uniform(0.0, 1.0) if female else 0.0,
        breast_level=dice.uniform(0.62, 0.72),
        breast_spread=dice.uniform(0.17, 0.22),
        half_width=dice.bell(0.315, 0.385) - (0.01 if female else 0.0),
        width_asymmetry=dice.uniform(-0.012, 0.012),
        apex_level=dice.bell(0.065, 0.125),
        apex_offset=dice.uniform(0.125, 0.155),
        apex_fullness=dice.uniform(0.52, 0.66),
        dome_level=dice.bell(0.635, 0.725),
        dome_difference=dice.uniform(0.012, 0.04),
        angle_depth=dice.uniform(0.09, 0.125),
        dome_position=dice.uniform(0.44, 0.54),
        dome_power=dice.uniform(2.1, 2.9),
        wall=dice.bell(0.035, 0.085),
        heart_ratio=dice.bell(0.39, 0.495),
        heart_right_share=dice.uniform(0.27, 0.36),
        knob_size=dice.bell(0.62, 1.38),
        knob_level=dice.uniform(0.265, 0.305),
        carina_level=dice.uniform(0.345, 0.385),
        hilum_level=dice.uniform(0.415, 0.445),
        spine_sway=dice.bell(-0.016, 0.016),
        spine_phase=dice.uniform(0.0, 6.283),
        rib_first=dice.uniform(0.0, 0.04),
        rib_spacing=dice.uniform(0.058, 0.068),
        rib_growth=dice.uniform(0.0004, 0.0016),
        rib_width=dice.uniform(0.021, 0.027),
        rib_slope=dice.uniform(0.9, 1.7),
        anterior_slope=dice.uniform(0.55, 0.9),
        anterior_shift=dice.uniform(-0.02, 0.03),
        clavicle_level=dice.uniform(0.175, 0.215),
        clavicle_rise=dice.uniform(0.05, 0.1),
        shoulder_level=dice.uniform(-0.01, 0.03),
        bone_density=dice.uniform(0.75, 1.25),
        vessel_density=dice.uniform(0.8, 1.15),
        seed=dice.integer(2**31),
    )


@dataclass(slots=True)
class Pose:
    """How the person stands in the film; maps body coordinates to pixels."""

    anteroposterior: bool
    inspiration: float  # how far the diaphragm stands above full inspiration
    zoom: float
    angle: float  # radians, positive turns the body clockwise in the image
    shift_x: float
    shift_y: float
    margins: tuple[float, float, float, float]  # collimated strip left, top, right, bottom (share of the shorter side)

    def matrix(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(2, 2) matrix and (2,) offset: pixel xy = matrix @ (u, v) + offset (pixel edges at integers)."""
        scale = min(height, width)
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        matrix = scale * self.zoom * np.array([[cosine, -sine], [sine, cosine]])
        centre = np.array([width / 2 + self.shift_x * scale, height / 2 + self.shift_y * scale])
        return matrix, centre - matrix @ np.array([0.0, 0.5])

    def visible(self, height: int, width: int) -> np.ndarray:
        """The exposed part of the film, (4,) xyxy pixels."""
        scale = min(height, width)
        left, top, right, bottom = (margin * scale for margin in self.margins)
        return np.array([left, top, width - right, height - bottom])


def sample_pose(dice: Dice) -> Pose:
    """Draw view, breathing and positioning."""
    anteroposterior = dice.chance(0.4)
    # Some films are badly centred; a few of them cut off the apices or the bases.
    draw = dice.random()
    loose = 1.0 if draw < 0.86 else 2.0 if draw < 0.95 else 7.0
    margins = [0.0, 0.0, 0.0, 0.0]
    if dice.chance(0.3):
        margins = [dice.uniform(0.0, 0.03) if dice.chance(0.6) else 0.0 for _ in range(4)]
    return Pose(
        anteroposterior=anteroposterior,
        inspiration=dice.uniform(0.03, 0.09) if anteroposterior else dice.uniform(-0.015, 0.04),
        zoom=dice.uniform(0.88, 1.15) if loose == 1.0 else dice.uniform(1.08, 1.26),
        angle=dice.bell(-0.13, 0.13) * min(loose, 1.2),
        shift_x=dice.uniform(-0.055, 0.055) * min(loose, 1.2),
        shift_y=dice.uniform(-0.045, 0.045) if loose == 1.0 else dice.bell(-0.035, 0.035) * loose,
        margins=tuple(margins),
    )


class Thorax:
    """Curves of one study: body, breathing and the changes of shape that findings cause.

    Args:
        body: The person.
        pose: View and breathing.
        heart_ratio: Cardiothoracic ratio of this study.
        raised: How far atelectasis raises the right and the left dome.
    """

    def __init__(self, body: Body, pose: Pose, heart_ratio: float, raised: dict[int, float] | None = None) -> None:
        raised = raised or {}
        self.body = body
        self.widest = 0.60
        self.widths = {
            RIGHT: body.half_width + body.width_asymmetry,
            LEFT: body.half_width - body.width_asymmetry,
        }
        # The heart rides on the diaphragm and the hila follow a little.
        lift = pose.inspiration
        self.domes = {
            RIGHT: body.dome_level - lift - raised.get(RIGHT, 0.0),
            LEFT: body.dome_level + body.dome_difference - lift - raised.get(LEFT, 0.0),
        }
        self.angles = {
            side: body.dome_level + body.angle_depth - 0.6 * lift + (0.012 if side == LEFT else 0.0)
            for side in (-1, 1)
        }
        self.carina = body.carina_level - 0.25 * lift
        self.hila = {RIGHT: body.hilum_level - 0.3 * lift, LEFT: body.hilum_level - 0.016 - 0.3 * lift}
        self.hilum_offset = 0.098
        heart = heart_ratio * (self.widths[RIGHT] + self.widths[LEFT])
        # A large heart grows to both sides; it must leave some lung at the left wall.
        share = max(body.heart_right_share, min(0.34, 0.27 + 0.6 * (heart_ratio - 0.5)))
        self.heart_right, self.heart_left = heart * share, heart * (1.0 - share)
        floor = 0.5 * (self.domes[RIGHT] + self.domes[LEFT])
        self.heart_top = self.carina + 0.045
        self.heart_apex = self.domes[LEFT] - 0.05
        self.heart_bottom = floor + 0.025
        self.knob_radius = 0.04 * body.knob_size**0.5
        self.knob_reach = 0.064 + 0.027 * body.knob_size
        self.svc_reach = 0.058
        self.upper_edge = dict.fromkeys((RIGHT, LEFT), body.hilum_level - 0.075 - 0.3 * lift)
        self.lower_edge = dict.fromkeys((RIGHT, LEFT), body.hilum_level + 0.065 - 0.35 * lift)
        self.apical_edge = body.clavicle_level - 0.005
        self._clavicles: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lists: dict[int, tuple[list[float], list[float], list[float]]] = {}

    # -- curves: of one side, or of BOTH at once as rows (2, N), right first; v and a are (N,) or (2, N) --

    def lateral(self, side: int, v: np.ndarray, drop: float = 0.0, retreat: float = 0.0) -> np.ndarray:
        """Distance of the lung's lateral edge from the midline at level v.

        `drop` lowers the apex and `retreat` pulls the upper part of the edge inwards: the contour of a collapsed lung.
        """
        body = self.body
        apex = body.apex_level + drop
        share = unit((v - apex) / (self.widest - apex))
        width = _column(self.widths, side)
        rise = (1.0 - (1.0 - share) ** 2.3) ** body.apex_fullness
        below = np.maximum(v - self.widest, 0.0)
        edge = body.apex_offset + (width - body.apex_offset) * rise - 0.3 * below * below
        if retreat:
            edge = edge - retreat * (1.0 - share) ** 1.3
        return edge

    def apex_medial(self, v: np.ndarray, drop: float = 0.0) -> np.ndarray:
        """Rounded medial border of the apex; 0 further down."""
        body = self.body
        share = unit((v - body.apex_level - drop) / 0.075)
        return body.apex_offset * (1.0 - np.sqrt(1.0 - (1.0 - share) ** 2))

    def medial(self, side: int, v: np.ndarray) -> np.ndarray:
        """Distance of the mediastinal border (vessels, aortic knob, heart) from the midline at level v."""
        if side == RIGHT:
            edge = self._right_border(v)
        elif side == LEFT:
            edge = self._left_border(v)
        else:
            right, left = v if v.ndim == 2 else (v, v)
            edge = np.array([self._right_border(right), self._left_border(left)])
        return np.maximum(edge, self.apex_medial(v))

    def _right_border(self, v: np.ndarray) -> np.ndarray:
        edge = np.maximum(0.052, self.svc_reach * _arch(v, 0.36, 0.2))
        middle = self.heart_bottom - 0.085
        half = np.where(v < middle, middle - self.heart_top + 0.02, 0.15)
        return np.maximum(edge, self.heart_right * _arch(v, middle, half) ** 1.2)

    def _left_border(self, v: np.ndarray) -> np.ndarray:
        edge = np.maximum(0.056, self.knob_reach * _arch(v, self.body.knob_level, self.knob_radius))
        edge = np.maximum(edge, 0.078 * _arch(v, self.hila[LEFT] - 0.025, 0.085))
        share = unit((v - self.heart_top + 0.02) / (self.heart_apex - self.heart_top + 0.02))
        upper = 0.06 + (self.heart_left - 0.06) * np.sin(0.5 * np.pi * share) ** 1.15
        fall = unit((v - self.heart_apex) / 0.13)
        return np.maximum(edge, np.where(share < 1.0, upper, self.heart_left * np.sqrt(1.0 - fall * fall)))

    def diaphragm(self, side: int, a: np.ndarray) -> np.ndarray:
        """Level of the diaphragm at distance a from the midline."""
        body = self.body
        dome = _column(self.domes, side)
        share = a / (_column(self.widths, side) - 0.006)
        peak = body.dome_position
        inner = unit((peak - share) / peak)
        outer = np.minimum(np.maximum((share - peak) / (1.0 - peak), 0.0), 1.08)
        depth = _column(self.angles, side) - dome
        return dome + 0.035 * inner * inner + depth * outer**body.dome_power

    def spine(self, v: np.ndarray) -> np.ndarray:
        """u of the spine's middle line at level v."""
        body = self.body
        return body.spine_sway * np.sin(4.0 * v + body.spine_phase)

    # -- outlines --

    @cached_property
    def _costophrenic(self) -> tuple[np.ndarray, np.ndarray]:
        level = _column(self.angles, BOTH)
        for _ in range(3):
            edge = self.lateral(BOTH, level)
            level = self.diaphragm(BOTH, edge)
        return edge, level

    def corner(self, side: int) -> tuple[float, float]:
        """(a, v) of the costophrenic angle: where lateral edge and diaphragm meet."""
        row = 0 if side == RIGHT else 1
        return tuple(float(values[row, 0]) for values in self._costophrenic)

    def contains(self, side: int, a: float, v: float, margin: float) -> bool:
        """True if a disc of radius `margin` around (a, v) lies in the aerated lung."""
        if side not in self._lists:
            curves = (self.lateral, self.medial, self.diaphragm)
            self._lists[side] = tuple(curve(side, _GRID_LEVELS).tolist() for curve in curves)
        lateral, medial, floor = self._lists[side]
        if not (self.body.apex_level + margin < v < 0.95 and margin < a < 0.95):
            return False
        for level in (v - 0.7 * margin, v, v + 0.7 * margin):
            row = int(level * _GRID + 0.5)
            if not medial[row] + margin < a < lateral[row] - margin:
                return False
        return all(floor[int(x * _GRID + 0.5)] - margin > v for x in (a - margin, a, a + margin))

    def clavicle(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Upper and lower border of a clavicle, each (N, 2) in (a, v) from the sternal to the acromial end."""
        if side not in self._clavicles:
            body = self.body
            a = 0.042 + (self.widths[side] * 1.02 - 0.042) * _SHAFT
            v = body.clavicle_level - body.clavicle_rise * _SHAFT_RISE + _SHAFT_WAVE
            self._clavicles[side] = np.array([a, v - _SHAFT_HALF]).T, np.array([a, v + _SHAFT_HALF]).T
        return self._clavicles[side]

    def anatomy_outlines(self) -> list[np.ndarray]:
        """Outlines (N, 2) in (u, v) of the 29 regions, in the order of the vocabulary; their hulls are the boxes."""
        regions: dict[str, np.ndarray] = {}
        body = self.body
        edges, levels = self._costophrenic
        top = body.apex_level
        # Down the lateral edge, inwards on the diaphragm, up the medial edge; denser at the apex, where the edge is
        # nearly horizontal. Also the whole diaphragm, and the edges of the lung at the levels where zones are cut.
        cuts = np.array(
            [
                [top, self.apical_edge, self.upper_edge[side], self.lower_edge[side], level - 0.075]
                for side, level in zip(SIDE_NAMES, levels[:, 0].tolist(), strict=True)
            ]
        )
        down = top + (levels - top) * _DENSE
        inner = self.medial(BOTH, _column(self.domes, BOTH) + 0.015)
        across = np.concatenate([edges + (inner - edges) * _EVEN, 0.05 + (edges - 0.05) * _EVEN], axis=1)
        floor = self.diaphragm(BOTH, across)
        count = len(_EVEN)
        up = top + (floor[:, count - 1 : count] - top) * _DENSE
        lateral = self.lateral(BOTH, np.concatenate([down, cuts], axis=1))
        medial = self.medial(BOTH, np.concatenate([up, cuts], axis=1))
        lungs = np.empty((2, 3 * count, 2))
        lungs[:, :, 0] = np.concatenate([lateral[:, :count], across[:, :count], medial[:, :count]], axis=1)
        lungs[:, :, 1] = np.concatenate([down, floor[:, :count], up], axis=1)
        heights = lungs[:, None, :, 1] <= cuts[:, :, None]
        near = ~heights[:, 4] & (lungs[:, :, 0] > edges - 0.07)
        # From distance to the midline to u.
        lungs[0, :, 0] *= RIGHT
        for row, (side, name) in enumerate(SIDE_NAMES.items()):
            lung, above = lungs[row], heights[row]
            # (5, 2, 2): lateral and medial end of each cut.
            ends = np.array([[side * lateral[row, count:], cuts[row]], [side * medial[row, count:], cuts[row]]]).T
            ends = ends.swapaxes(1, 2)
            regions[f"{name} lung"] = lung
            regions[f"{name} apical zone"] = np.concatenate([lung[above[1]], ends[0], ends[1]])
            regions[f"{name} upper lung zone"] = np.concatenate([lung[above[2]], ends[0], ends[2]])
            regions[f"{name} mid lung zone"] = np.concatenate([lung[above[3] & ~above[2]], ends[2], ends[3]])
            regions[f"{name} lower lung zone"] = np.concatenate([lung[~above[3]], ends[3]])
            hilum = (side * self.hilum_offset, self.hila[side])
            regions[f"{name} hilar structures"] = _UNIT_CIRCLE * (0.052, 0.078) + hilum
            edge, level = self.corner(side)
            regions[f"{name} costophrenic angle"] = np.concatenate(
                [lung[near[row]], ends[4, :1], [[side * edge, level]]]
            )
            regions[f"{name} hemidiaphragm"] = np.array([side * across[row, count:], floor[row, count:]]).T
            regions[f"{name} clavicle"] = np.concatenate(self.clavicle(side)) * (side, 1.0)
        centre = self.trachea_centre()
        regions["trachea"] = _corners(centre - 0.024, 0.03, centre + 0.024, self.carina)
        spine = self.spine(_SPINE)
        regions["spine"] = np.concatenate(
            [np.array([spine - 0.043, _SPINE]), np.array([spine + 0.043, _SPINE])], axis=1
        ).T
        knob = body.knob_level
        regions["aortic arch"] = _corners(0.005, knob - self.knob_radius, self.knob_reach, knob + self.knob_radius)
        borders = self.borders
        regions["mediastinum"] = np.concatenate(borders)
        regions["upper mediastinum"] = _corners(-self.svc_reach, top + 0.01, self.knob_reach, self.carina)
        junction = self.heart_top + 0.012
        regions["svc"] = _corners(-self.svc_reach, knob - 0.03, -0.018, junction)
        regions["cardiac silhouette"] = self.heart_outline()
        reach = float(np.interp(junction, borders[0][:, 1], -borders[0][:, 0]))
        regions["cavoatrial junction"] = _corners(-reach, junction - 0.022, -reach + 0.045, junction + 0.022)
        regions["right atrium"] = _corners(-self.heart_right, junction, -0.01, self.heart_bottom - 0.035)
        regions["carina"] = _corners(centre - 0.032, self.carina - 0.025, centre + 0.032, self.carina + 0.025)
        floor = min(self.domes.values())
        regions["abdomen"] = _corners(-self.widths[RIGHT], floor, self.widths[LEFT], 1.0)
        return [regions[name] for name in ANATOMY_NAMES]

    @cached_property
    def borders(self) -> tuple[np.ndarray, np.ndarray]:
        """Right and left border of the mediastinum, apices to bottom of the heart, each (N, 2) in (u, v)."""
        top = self.body.apex_level + 0.01
        upper = top + (self.heart_top - top) * _UPPER
        lower = self.heart_top + (self.heart_bottom - self.heart_top) * _LOWER
        # The knob is small: its widest level has to be among the samples.
        levels = np.sort(np.concatenate([upper, lower, [self.body.knob_level]]))
        right, left = self.medial(BOTH, levels)
        return np.array([RIGHT * right, levels]).T, np.array([left, levels]).T

    def heart_outline(self) -> np.ndarray:
        """(N, 2) outline of the cardiac silhouette in (u, v)."""
        return np.concatenate([border[border[:, 1] >= self.heart_top] for border in self.borders])

    def trachea_centre(self) -> float:
        """u of the trachea, slightly on the patient's right above the aortic arch."""
        return 0.4 * float(self.spine(np.float64(0.25))) - 0.004


def _column(values: dict[int, float], side: int) -> float | np.ndarray:
    """The value of one side, or those of both as a column (2, 1)."""
    return np.array([[values[RIGHT]], [values[LEFT]]]) if side == BOTH else values[side]


def unit(values: np.ndarray) -> np.ndarray:
    """Values clipped to [0, 1] (np.clip costs several times as much on short arrays)."""
    return np.minimum(np.maximum(values, 0.0), 1.0)


def _arch(v: np.ndarray, middle: float, half: float) -> np.ndarray:
    """Half an ellipse: 1 in the middle, 0 at and beyond middle +- half."""
    share = (v - middle) / half
    return np.sqrt(np.maximum(1.0 - share * share, 0.0))


def _corners(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def hull_boxes(outlines: list[np.ndarray], matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Axis-aligned pixel boxes (K, 4) xyxy around K outlines (N_k, 2) of the body frame after the pose's mapping."""
    pixels = np.concatenate(outlines) @ matrix.T + offset
    starts = np.cumsum([0, *(len(outline) for outline in outlines[:-1])])
    return np.concatenate([np.minimum.reduceat(pixels, starts), np.maximum.reduceat(pixels, starts)], axis=1)


def clip_boxes_to_frame(boxes: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip (K, 4) xyxy boxes to a frame (4,) xyxy; also returns the share (K,) of each area that is left."""
    low, high = frame[[0, 1, 0, 1]], frame[[2, 3, 2, 3]]
    clipped = np.minimum(np.maximum(boxes, low), high)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    return clipped, left / np.maximum(area, 1e-12)
