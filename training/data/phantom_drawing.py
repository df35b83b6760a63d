"""Draws the synthetic radiograph: attenuation along the beam, summed structure by structure, then the film's response.

Everything is evaluated per pixel from curves of the body frame (look-up tables over u or v), so any resolution shows
the same person. Line-like structures (vessels, clavicles, bronchi) are drawn as supersampled vector graphics.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

from .phantom_anatomy import BOTH, LEFT, RIGHT, Body, Dice, Pose, Thorax, unit
from .phantom_findings import Finding, fluid_surface, radius_factor


F = np.float32


@lru_cache(maxsize=8)
def _pixel_centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(width, dtype=np.float64) + 0.5, np.arange(height, dtype=np.float64) + 0.5


def _ramp(distance: np.ndarray, softness: float) -> np.ndarray:
    """0 to 1 across an edge; 0.5 where the signed distance is 0."""
    share = distance * F(1.0 / softness)
    share += F(0.5)
    return _unit(share)


def _unit(values: np.ndarray) -> np.ndarray:
    """Clip a temporary array to [0, 1] in place (one pass; the method skips the checks of np.clip)."""
    return values.clip(F(0), F(1), out=values)


def _extent(plane: np.ndarray) -> tuple[float, float]:
    """Range of a linear function on the grid, with a margin; its extremes lie in the corners."""
    corners = plane[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()
    return min(corners) - 0.01, max(corners) + 0.01


def _index(values: np.ndarray) -> np.ndarray:
    """Float to index; NumPy converts to 32 bits first several times as fast."""
    return values.astype(np.int32).astype(np.intp)


class Film:
    """One image in the making: the pixel grid in body coordinates and look-up by u, by v and by side and v."""

    def __init__(self, pose: Pose, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.scale = min(height, width)
        self.matrix, self.offset = pose.matrix(height, width)
        self._to_pixels, self._start = self.matrix.tolist(), self.offset.tolist()
        self._zoom = float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))
        inverse = np.linalg.inv(self.matrix)
        x, y = _pixel_centres(height, width)
        (ux, uy), (vx, vy) = inverse = np.linalg.inv(self.matrix)
        u_start, v_start = -inverse @ self.offset
        self.U = ((ux * x + u_start) + (uy * y)[:, None]).astype(F)
        self.V = ((vx * x + v_start) + (vy * y)[:, None]).astype(F)
        self.A = np.abs(self.U)
        steps = self.steps = 3.0 * self.scale
        self.u_low, u_high = _extent(self.U)
        self.v_low, v_high = _extent(self.V)
        self.u_table = np.arange(self.u_low, u_high + 1 / steps, 1 / steps).astype(F)
        self.v_table = np.arange(self.v_low, v_high + 1 / steps, 1 / steps).astype(F)
        self.iu = _index((self.U - F(self.u_low)) * F(steps))
        self.iv = _index((self.V - F(self.v_low)) * F(steps))
        self.isv = self.iv + (self.U > 0) * np.intp(len(self.v_table))

    # The tables cover the whole film; of NumPy's treatments of other indices, "wrap" is the fastest.

    def by_u(self, table: np.ndarray) -> np.ndarray:
        """(H, W) values of a function tabulated over `u_table`."""
        return table.astype(F, copy=False).take(self.iu, mode="wrap")

    def by_v(self, table: np.ndarray) -> np.ndarray:
        """(H, W) values of a function tabulated over `v_table`."""
        return table.astype(F, copy=False).take(self.iv, mode="wrap")

    def by_side(self, both: np.ndarray) -> np.ndarray:
        """(H, W) values of a function per side, tabulated over `v_table` in two rows (right, left)."""
        return both.astype(F, copy=False).take(self.isv, mode="wrap")

    def window(self, u: float, v: float, radius: float) -> tuple[slice, slice]:
        """Rows and columns around a body point."""
        (ux, vx), (uy, vy) = self._to_pixels
        x, y = ux * u + vx * v + self._start[0], uy * u + vy * v + self._start[1]
        reach = radius * self._zoom + 1.0
        return self._clip(x - reach, y - reach, x + reach, y + reach)

    def box(self, points: np.ndarray, margin: float) -> tuple[slice, slice]:
        """Rows and columns that hold body points (N, 2) and a margin in body units."""
        pixels = points @ self.matrix.T + self.offset
        reach = margin * self._zoom + 1.0
        return self._clip(*(pixels.min(axis=0) - reach).tolist(), *(pixels.max(axis=0) + reach).tolist())

    def _clip(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        def cut(first: float, last: float, length: int) -> slice:
            start = min(max(0, int(first)), length)
            return slice(start, max(start, min(length, int(last) + 2)))

        return cut(top, bottom, self.height), cut(left, right, self.width)


class Sketch:
    """A supersampled grey canvas for vector graphics in body coordinates, over the film or a window of it."""

    def __init__(self, film: Film, window: tuple[slice, slice] | None = None) -> None:
        self.factor = 2 if film.scale <= 640 else 1
        rows, columns = window or (slice(0, film.height), slice(0, film.width))
        size = columns.stop - columns.start, rows.stop - rows.start
        self.image = Image.new("L", (size[0] * self.factor, size[1] * self.factor))
        self.draw = ImageDraw.Draw(self.image)
        self.matrix = film.matrix * self.factor
        self.offset = (film.offset - (columns.start, rows.start)) * self.factor
        self.unit = film.scale * self.factor

    def points(self, points: np.ndarray) -> list[float]:
        """Canvas coordinates of body points (N, 2), flat."""
        return (points @ self.matrix.T + self.offset).ravel().tolist()

    def line(self, points: np.ndarray, width: float, value: int) -> None:
        """A polyline; width in body units."""
        thickness = max(1, round(width * self.unit))
        # Rounded joints are slow and invisible on thin lines.
        joint = "curve" if thickness > 5 else None
        self.draw.line(self.points(points), fill=value, width=thickness, joint=joint)

    def polygon(self, points: np.ndarray, value: int) -> None:
        """A filled polygon."""
        self.draw.polygon(self.points(points), fill=value)

    def result(self, blur: float = 0.0) -> np.ndarray:
        """(H, W) float32 in [0, 1]; blur in body units."""
        if not all(self.image.size):  # what is drawn lies beside the film, and Pillow refuses to reduce nothing
            return np.zeros((self.image.height // self.factor, self.image.width // self.factor), dtype=F)
        image = self.image.reduce(self.factor) if self.factor > 1 else self.image
        radius = blur * self.unit / self.factor
        if radius > 0.6:  # below that the reduction has smoothed enough
            image = image.filter(ImageFilter.BoxBlur(radius))
        result = np.asarray(image).astype(F)
        result *= F(1 / 255)
        return result


def draw_film(
    body: Body,
    pose: Pose,
    thorax: Thorax,
    findings: list[Finding],
    bubble: tuple[float, float, float, float] | None,
    dice: Dice,
    noise: np.random.Generator,
    height: int,
    width: int,
    layers: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Draw one radiograph.

    Args:
        body, pose, thorax, findings: The study.
        bubble: Gastric air bubble (u, v, radius u, radius v) or None.
        dice: Source of exposure, texture and marker; draws must not depend on the image size.
        noise: Source of the film noise.
        height, width: Image size in pixels.
        layers: If given, receives the masks "lung", "heart" and one per finding ("finding 0", ...) as (H, W) float32.

    Returns:
        (H, W) uint8.
    """
    film = Film(pose, height, width)
    by_class = {finding.category: finding for finding in findings}
    V, A = film.V, film.A
    vt, ut = film.v_table, film.u_table
    texture = _texture(dice, film)

    # Air of the lungs between wall, mediastinum and diaphragm.
    lateral = film.by_side(thorax.lateral(BOTH, vt))
    borders = thorax.medial(BOTH, vt)
    medial = film.by_side(borders)
    au = np.abs(ut)
    above_floor = film.by_u(np.where(ut < 0, *thorax.diaphragm(BOTH, au)))
    above_floor -= V
    edge = lateral - A
    # Above the apex both edges coincide, so the row has to be compared too.
    depth = A - medial
    np.minimum(depth, edge, out=depth)
    np.minimum(depth, above_floor, out=depth)
    np.minimum(depth, V - F(body.apex_level), out=depth)
    lung = _ramp(depth, 0.011)
    if layers is not None:
        layers["lung"] = lung.copy()

    # Soft tissue: chest wall, shoulders, arms.
    wall = body.wall
    wide = max(thorax.widths.values())
    flare = 0.5 * np.exp(-unit((vt - 0.22) / 1.1) * 20) + 0.03 * unit(vt - 0.55)
    tissue = film.by_v(wide + wall + flare)
    tissue -= A
    slope = unit(au - 0.085)
    shoulder_table = body.shoulder_level - 0.03 + 0.36 * slope - np.where(slope > 0, 0.3 * np.exp(-slope / 0.03), 2.0)
    np.minimum(tissue, V - film.by_u(shoulder_table), out=tissue)
    arm = A - film.by_v(wide + wall + 0.045 + 0.12 * (vt - 0.3))
    np.minimum(arm, V - F(0.2), out=arm)
    np.maximum(tissue, arm, out=tissue)
    thickness = _unit(tissue * F(1 / 0.16))
    np.sqrt(thickness, out=thickness)
    thickness *= F(0.38)
    thickness += F(0.20)
    T = _ramp(tissue, 0.008)
    T *= thickness
    grain = texture * F(0.16)
    grain += F(0.92)
    T *= grain

    # Above the apices the middle is only neck.
    neck = 0.05 + unit((vt - body.apex_level - 0.07) / 0.1)
    central = film.by_v(neck)
    np.minimum(central, medial, out=central)
    central -= A
    central *= F(1 / 0.09)
    _unit(central)
    central *= F(2) - central
    # The belly is dense in the middle and thins out towards the flanks, where wall and belly are one.
    abdomen = _unit(above_floor * F(-1 / 0.16))
    abdomen *= _unit((F(wide + 0.5 * wall) - A) * F(1 / 0.16))
    abdomen *= F(0.9)
    np.maximum(central, abdomen, out=central)
    central *= F(0.17)
    T += central
    below = _ramp(-above_floor, 0.012)
    below *= _unit((edge + F(0.02)) * F(1 / 0.05))
    below *= F(0.05)
    T += below

    air = _unit(depth * F(1 / 0.13))
    np.sqrt(air, out=air)
    air *= F(0.25)
    air += F(0.16)
    air *= lung
    T -= air
    beating = (vt > thorax.heart_top) & (vt < thorax.heart_bottom + 0.03)
    heart = film.by_side(np.where(beating, borders, -1.0))
    heart -= A
    heart_mask = np.minimum(heart, above_floor + F(0.05))
    heart_mask *= F(1 / 0.05)
    _unit(heart_mask)
    heart_mask *= _unit((V - F(thorax.heart_top + 0.02)) * F(1 / 0.13))
    heart_mask *= F(0.06)
    T += heart_mask
    if layers is not None:
        layers["heart"] = _ramp(heart, 0.011)

    _breasts(body, film, T)
    _bones(body, thorax, film, T, lung, edge, above_floor, tissue)
    vessels = _vessels(body, thorax, film, by_class)
    _hila(body, thorax, film, T, dice)

    collapse = by_class.get("Pneumothorax")
    if collapse is not None:
        gas = _pneumothorax(thorax, film, collapse, depth)
        vessels *= F(1) - gas
        T -= gas * F(0.07)
    marks = vessels
    marks *= lung
    T += marks * F(0.15)
    _airways(thorax, film, T, bubble)

    for index, finding in enumerate(findings):
        mask = _draw_finding(thorax, film, finding, T, lung, marks, texture, above_floor, dice)
        if layers is not None and mask is not None:
            layers[f"finding {index}"] = mask
    return _expose(film, pose, T, dice, noise)


@lru_cache(maxsize=4)
def _stretch(cells: int) -> np.ndarray:
    """(32, cells) matrix of the bicubic resize from `cells` to 32 values."""
    return np.array(Image.fromarray(np.eye(cells, dtype=F)).resize((cells, 32), Image.Resampling.BICUBIC))


def _texture(dice: Dice, film: Film) -> np.ndarray:
    """Smooth random field in [0, 1] with a few octaves, tied to the film's frame."""
    rng = np.random.default_rng(dice.integer(2**31))
    # The octaves are summed on a small grid; only the sum is brought to full size.
    field = F(0.2) * rng.random((32, 32), dtype=F)
    for cells, weight in ((5, 0.5), (12, 0.3)):
        matrix = _stretch(cells)
        field += F(weight) * (matrix @ rng.random((cells, cells), dtype=F) @ matrix.T)
    full = Image.fromarray(field).resize((film.scale, film.scale), Image.Resampling.BICUBIC)
    if full.size != (film.width, film.height):
        full = full.resize((film.width, film.height), Image.Resampling.BILINEAR)
    return np.asarray(full)


def _breasts(body: Body, film: Film, T: np.ndarray) -> None:
    if not body.female:
        return
    size = 0.085 + 0.05 * body.breast_size
    for side in (RIGHT, LEFT):
        u, v = side * body.breast_spread, body.breast_level - 0.55 * size
        window = film.window(u, v, 1.6 * size)
        across = (film.U[window] - F(u)) * F(1 / (1.15 * size))
        down = (film.V[window] - F(v)) * F(1 / size)
        # Fades out upwards, ends sharply at the lower fold.
        radius = np.maximum(down, F(-0.45) * down)
        radius *= radius
        radius += across * across
        shade = _ramp(F(1) - np.sqrt(radius), 0.22)
        shade *= _unit(F(0.75) + F(0.4) * down)
        shade *= F(0.06 + 0.08 * body.breast_size)
        T[window] += shade


# Shoulder blade relative to the widest point of the rib cage, and head of the upper arm.
_BLADE = np.array([[-0.02, 0.17], [-0.035, 0.28], [0.0, 0.40], [0.02, 0.41], [0.085, 0.20]])
_TURN = np.linspace(0, 2 * np.pi, 20)
_HEAD = np.stack([0.047 * np.cos(_TURN), 0.05 * np.sin(_TURN)], axis=1)
_BUBBLE_TURN = np.linspace(0, 2 * np.pi, 28)
_BUBBLE = np.stack([np.cos(_BUBBLE_TURN), np.sin(_BUBBLE_TURN)], axis=1)


def _rib_profile(position: np.ndarray, levels: np.ndarray, widths: np.ndarray, edge: float) -> np.ndarray:
    """Density over the position across the ribs: plateau with brighter cortical borders."""
    total = np.zeros_like(position)
    steps = 1.0 / float(position[1] - position[0])
    reach = int(0.75 * float(widths.max()) * steps) + 1
    first = ((levels - float(position[0])) * steps).astype(int) - reach
    rows = first[:, None] + np.arange(2 * reach + 2)
    share = np.abs(position.take(rows, mode="clip") - levels[:, None]) / (0.5 * widths)[:, None]
    border = (share - 0.86) / 0.2
    profile = unit((1.12 - share) / 0.24) * (0.62 + edge * np.exp(-border * border))
    for start, row in zip(first.tolist(), profile, strict=True):
        if start >= 0:
            total[start : start + len(row)] += row[: len(total) - start]
    return total


def _take_bent(profile: np.ndarray, film: Film, bend: np.ndarray) -> np.ndarray:
    """(H, W) values of a profile tabulated from v = -0.4, bent downwards by `bend`, which is overwritten."""
    np.subtract(film.V, bend, out=bend)
    bend += F(0.4)
    bend *= F(film.steps)
    return profile.take(_index(bend), mode="clip")


def _bones(
    body: Body,
    thorax: Thorax,
    film: Film,
    T: np.ndarray,
    lung: np.ndarray,
    edge: np.ndarray,
    above_floor: np.ndarray,
    tissue: np.ndarray,
) -> None:
    """Ribs, spine, clavicles, shoulder blades."""
    rng = Dice(np.random.default_rng(body.seed), 96)
    A = film.A
    density = F(body.bone_density)
    table = np.arange(-0.4, 1.3, 1 / film.steps).astype(F)
    levels, widths = [], []
    level = body.apex_level - 0.03 + body.rib_first
    for index in range(11):
        levels.append(level + rng.uniform(-0.004, 0.004))
        widths.append(body.rib_width * rng.uniform(0.9, 1.1))
        level += body.rib_spacing + body.rib_growth * index
    levels, widths = np.array(levels), np.array(widths)
    posterior = _rib_profile(table, levels, widths, 0.45)
    posterior *= F(0.098) * density
    anterior = _rib_profile(table, levels[1:8] + 0.06 + body.anterior_shift, 1.12 * widths[1:8], 0.25)
    anterior *= F(0.06) * density

    # Behind: out of the spine, slightly up, then down along the wall. In front: downwards to the midline.
    inner = A - F(0.085)
    bend = inner * F(body.rib_slope)
    bend *= inner
    ribs = _take_bent(posterior, film, bend)
    # Seen along its surface at the wall, a rib is denser there.
    turn = np.abs(edge)
    turn *= F(-1 / 0.05)
    turn += F(1)
    _unit(turn)
    turn *= F(0.7)
    turn += F(1)
    ribs *= turn
    reach = F(thorax.widths[RIGHT]) - A
    bend = reach * F(body.anterior_slope)
    bend -= F(0.6) * reach * reach
    front = _take_bent(anterior, film, bend)
    front *= _unit((A - F(0.15)) * F(1 / 0.05))
    ribs += front

    # Only inside the cage, fading below the diaphragm, clearer through air.
    ribs *= _unit((edge + F(0.022)) * F(1 / 0.012))
    ribs *= _unit((A - F(0.035)) * F(1 / 0.02))
    fade = above_floor + F(0.16)
    fade *= F(1 / 0.12)
    ribs *= fade.clip(F(0.25), F(1), out=fade)
    clear = lung * F(0.55)
    clear += F(0.45)
    ribs *= clear
    T += ribs

    # Spine: column, discs and cortical borders, in the strip of columns that holds it.
    near = np.flatnonzero(A.min(axis=0) < F(0.075))
    if len(near):
        strip = slice(near[0], near[-1] + 1)
        rows = film.iv[:, strip]
        across = np.abs(film.U[:, strip] - thorax.spine(film.v_table).astype(F).take(rows, mode="clip"))
        column = _ramp(F(0.036) - across, 0.012)
        share = (film.v_table + F(0.02)) / F(0.062)
        share = np.abs(share - np.round(share))
        disc = (0.06 - 0.035 * unit((0.17 - share) / 0.08)).astype(F).take(rows, mode="clip")
        border = (across - F(0.034)) * F(1 / 0.006)
        border *= border
        border = np.exp(-border)
        border *= F(0.018) * density
        disc *= density
        column *= disc
        column += border
        T[:, strip] += column

    points = []
    for side in (RIGHT, LEFT):
        wide = thorax.widths[side]
        arm = [[wide + 0.125, 0.22], [wide + 0.20, 0.5]]
        shapes = (_BLADE + (wide, 0.0), _HEAD + (wide + 0.105, 0.195), arm, *thorax.clavicle(side))
        points.append(np.concatenate(shapes) * (side, 1.0))
    window = film.box(np.concatenate(points), 0.03)
    sketch = Sketch(film, window)
    draw = sketch.draw
    border = max(1, round(0.004 * sketch.unit))
    # Where each shape starts in the flat list of coordinates; the drawing calls take parts of it.
    cuts = np.cumsum([0, *(2 * len(shape) for shape in shapes)]).tolist()
    for side_points in points:
        flat = sketch.points(side_points)
        blade, head, arm, upper, lower = (flat[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
        draw.polygon(blade, fill=42)
        draw.line(blade[:8], fill=70, width=max(1, round(0.006 * sketch.unit)))
        draw.polygon(head, fill=65)
        draw.line(arm, fill=80, width=max(1, round(0.05 * sketch.unit)))
        # Up to the acromial end on the upper border, back on the lower one.
        draw.polygon(upper + sketch.points(side_points[::-1])[: len(lower)], fill=150)
        draw.line(upper, fill=215, width=border)
        draw.line(lower, fill=215, width=border)
    bones = sketch.result(0.0025)
    bones *= _ramp(tissue[window], 0.03)
    bones *= F(0.22) * density
    T[window] += bones


# Directions of the first vessels of both lungs, from upwards over lateral to downwards; 0 points laterally.
_STEMS = 9
_STEM_ANGLES = np.tile(np.linspace(-1.32, 1.35, _STEMS), 2)
_STEM_SIDES = np.repeat([RIGHT, LEFT], _STEMS)


def _vessels(body: Body, thorax: Thorax, film: Film, by_class: dict[str, Finding]) -> np.ndarray:
    """Branching vessels from both hila, thick to thin."""
    sketch = Sketch(film)
    rng = np.random.default_rng([body.seed, 1])
    edema = by_class.get("Edema")
    swell = 1.0 if edema is None else 1.15 + 0.12 * edema.severity
    # Both sides grow together: arrays hold the branches of the right, then of the left lung.
    count = 2 * _STEMS
    sides = _STEM_SIDES
    angle = _STEM_ANGLES + rng.uniform(-0.12, 0.12, count)
    sine = np.sin(angle)
    hila = np.where(sides == RIGHT, thorax.hila[RIGHT], thorax.hila[LEFT])
    start = np.array([thorax.hilum_offset - 0.03 + 0.02 * rng.random(count), hila + 0.045 * sine])
    length = (0.05 + 0.03 * rng.random(count)) * (1.0 + 0.25 * np.abs(sine))
    width = 0.0125 * (0.75 + 0.45 * rng.random(count)) * swell * body.vessel_density
    draw = sketch.draw.line
    for value, halves in ((200, 2), (165, 2), (130, 4)):
        # The finest branches get more bends instead of children.
        path = [start]
        for half in range(halves):
            if half:
                angle = angle + rng.uniform(-0.35, 0.35, len(angle))
            path.append(path[-1] + 0.5 * length * np.array([np.cos(angle), np.sin(angle)]))
        lines = np.array(path)
        lines[:, 0] *= sides
        lines = lines.transpose(2, 0, 1) @ sketch.matrix.T + sketch.offset
        widths = np.maximum(1, np.rint(width * sketch.unit)).astype(int).tolist()
        for line, thick in zip(lines.reshape(len(lines), -1).tolist(), widths, strict=True):
            draw(line, fill=value, width=thick)
        spread = rng.uniform(0.22, 0.5, len(angle))
        angle = np.concatenate([angle - spread * 0.6, angle + spread])
        start = np.concatenate([path[-1], path[-1]], axis=1)
        length = np.concatenate([length, length]) * rng.uniform(0.66, 0.93, len(angle))
        width = np.concatenate([width, width]) * 0.62
        sides = np.concatenate([sides, sides])
    # Vessels seen end on: small round shadows near the hilum.
    for side in (RIGHT, LEFT):
        for _ in range(2):
            a, v = 0.1 + 0.07 * rng.random(), thorax.hila[side] + rng.uniform(-0.06, 0.08)
            dot = np.array([[side * a - 0.002, v], [side * a + 0.002, v]])
            sketch.line(dot, 0.011 + 0.005 * rng.random(), 190)
    if edema is not None:
        # Septal lines at the lateral base.
        for side in (RIGHT, LEFT):
            edge, level = thorax.corner(side)
            for row in range(6 + 3 * edema.severity):
                v = level - 0.05 - 0.021 * row
                a = float(thorax.lateral(side, np.float64(v))) - 0.004
                sketch.line(np.array([[side * a, v], [side * (a - 0.03), v + 0.006 * rng.random()]]), 0.0028, 150)
    return sketch.result(0.001)


def _hila(body: Body, thorax: Thorax, film: Film, T: np.ndarray, dice: Dice) -> None:
    for side in (RIGHT, LEFT):
        for down, radius, strength in ((-0.012, 0.04, 0.07), (0.03, 0.032, 0.06)):
            u, v = side * (thorax.hilum_offset - 0.02 + dice.uniform(-0.005, 0.005)), thorax.hila[side] + down
            window = film.window(u, v, 2.4 * radius)
            across, down = film.U[window] - F(u), film.V[window] - F(v)
            square = (across * across + F(0.6) * down * down) * F(1 / radius**2)
            T[window] += F(strength) * np.exp(-square * square)


def _airways(thorax: Thorax, film: Film, T: np.ndarray, bubble: tuple | None) -> None:
    """Trachea, main bronchi and the gastric bubble: darker than what surrounds them."""
    centre, carina = thorax.trachea_centre(), thorax.carina
    trachea = np.array([[centre + 0.004, -0.3], [centre, 0.2], [centre, carina - 0.008]])
    right = np.array([[centre, carina - 0.012], [centre - 0.04, carina + 0.03], [centre - 0.07, carina + 0.055]])
    left = np.array([[centre, carina - 0.012], [centre + 0.05, carina + 0.028], [centre + 0.085, carina + 0.045]])
    window = film.box(np.concatenate([trachea, right, left]), 0.03)
    sketch = Sketch(film, window)
    sketch.line(trachea, 0.034, 150)
    sketch.line(right, 0.023, 75)
    sketch.line(left, 0.02, 65)
    T[window] -= sketch.result(0.004) * F(0.24)
    if bubble is not None:
        u, v, radius_u, radius_v = bubble
        outline = _BUBBLE * (radius_u, radius_v) + (u, v)
        window = film.box(outline, 0.01)
        sketch = Sketch(film, window)
        sketch.polygon(outline, 210)
        T[window] -= sketch.result(0.004) * F(0.24)


def _pneumothorax(thorax: Thorax, film: Film, finding: Finding, depth: np.ndarray) -> np.ndarray:
    """Mask of the air outside the collapsed lung; also adds nothing to the film itself."""
    side, shape = finding.side, finding.shape
    vt = film.v_table
    drop, retreat = shape["drop"], shape["retreat"]
    start = thorax.body.apex_level + drop
    outer = np.where(vt < start, 0.0, thorax.lateral(side, vt, drop, retreat))
    # Steep where the contour turns into the apex: distances are measured across the line, not along the row.
    slope = np.gradient(outer, vt)
    scale = 1.0 / np.sqrt(1.0 + np.clip(slope, -8, 8) ** 2)
    inner = np.maximum(thorax.apex_medial(vt, drop), 0.0) * (vt > start)
    beyond = (film.A - film.by_v(outer)) * film.by_v(scale)
    above = np.maximum(beyond, film.by_v(inner) - film.A)
    on_side = film.U * side > 0
    shape["line"] = (above, on_side)
    return _ramp(above - F(0.004), 0.008) * _ramp(depth, 0.011) * on_side


def _soft_blob(film: Film, shape: dict, reach: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """Window and relative radius (1 on the outline) of a star-shaped finding."""
    side, (a, v), (radius_a, radius_v) = shape["side"], shape["centre"], shape["radii"]
    window = film.window(side * a, v, reach * 1.5 * max(radius_a, radius_v))
    across = (film.U[window] * F(side) - F(a)) * F(1 / radius_a)
    down = (film.V[window] - F(v)) * F(1 / radius_v)
    radius = np.sqrt(across * across + down * down)
    return window, radius / radius_factor(np.arctan2(down, across), shape["waves"]).astype(F)


def _draw_finding(
    thorax: Thorax,
    film: Film,
    finding: Finding,
    T: np.ndarray,
    lung: np.ndarray,
    marks: np.ndarray,
    texture: np.ndarray,
    above_floor: np.ndarray,
    dice: Dice,
) -> np.ndarray | None:
    """Add one finding to the film; returns its mask (H, W), None where the anatomy itself is the finding."""
    mask = np.zeros_like(T)
    shape = finding.shape
    if finding.category == "Pleural effusion":
        side = finding.side
        surface = fluid_surface(thorax, side, np.abs(film.u_table), shape)
        surface = np.where(film.u_table * side > 0, surface, 9.0)
        depth = film.V - film.by_u(surface)
        mask = _ramp(depth, 0.016) * lung
        T += mask * (F(0.60 * shape["opacity"]) * _unit(F(0.72) - T) + F(0.06))
        return mask
    if finding.category == "Pneumothorax":
        above, on_side = shape.pop("line")
        line = _unit(F(1) - np.abs(above) * F(1 / 0.005)) * on_side * lung
        line *= _ramp(F(shape["end"]) - film.V, 0.06)
        T += line * F(0.085)
        return _ramp(above - F(0.004), 0.008) * lung * on_side
    if finding.category == "Edema":
        for part in shape["parts"]:
            window, radius = _soft_blob(film, part, 1.5)
            haze = _unit((F(1.35) - radius) * F(1 / 0.95)) * lung[window]
            haze *= film.U[window] * part["side"] > 0
            T[window] += haze * F(shape["strength"]) * (F(0.5) + F(1.0) * texture[window])
            mask[window] = np.maximum(mask[window], haze)
        return mask
    if finding.category == "Consolidation":
        window, radius = _soft_blob(film, shape, 1.3)
        patch = _unit((F(1.2) - radius) * F(1 / 0.55)) * lung[window]
        patch *= film.U[window] * shape["side"] > 0
        strength = F(shape["strength"])
        # Vessels drown in it, the bronchi beside them stay dark.
        T[window] += patch * strength * (F(0.45) + F(1.1) * texture[window]) - patch * marks[window] * F(0.30)
        mask[window] = patch
        return mask
    if finding.category == "Atelectasis":
        for a, v, angle, half, thick, strength in shape["bands"]:
            window = film.window(shape["side"] * a, v, half + 3 * thick)
            across = film.U[window] * F(shape["side"]) - F(a)
            down = film.V[window] - F(v)
            along = across * F(np.cos(angle)) + down * F(np.sin(angle))
            off = down * F(np.cos(angle)) - across * F(np.sin(angle))
            # The band swells in the middle and runs out at its ends.
            taper = _unit((F(half) - np.abs(along)) * F(1 / (0.35 * half)))
            band = np.exp(-((off * F(1 / thick)) ** 2)) * taper * lung[window]
            T[window] += band * F(strength)
            mask[window] = np.maximum(mask[window], band)
        return mask
    if finding.category in ("Nodule", "Mass"):
        window, radius = _soft_blob(film, shape, 1.15)
        soft = 0.4 if finding.category == "Nodule" else 0.32
        spot = _unit((F(1 + 0.5 * soft) - radius) * F(1 / soft)) * lung[window]
        bulk = np.sqrt(_unit(F(1.25) - radius * radius))
        T[window] += spot * bulk * F(shape["strength"]) * (F(0.85) + F(0.3) * texture[window])
        mask[window] = spot
        return mask
    return None


# Entries of the film's response table, for attenuation 0 to 1.6.
_TONES = 2048
_TONE_VALUES = np.arange(_TONES, dtype=F) / F(_TONES / 1.6)

# 5 x 7 letters, one integer per row, most significant bit on the left.
_GLYPHS = {
    "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "Y": (17, 17, 10, 4, 4, 4, 4),
}


@lru_cache(maxsize=64)
def _stamp(text: str, scale: int) -> np.ndarray:
    # Five columns and an empty one per letter; shifting by 5 gives the empty one.
    columns = [[(row >> shift) & 1 for row in _GLYPHS[letter]] for letter in text for shift in (4, 3, 2, 1, 0, 5)]
    return np.kron(np.array(columns, dtype=bool).T, np.ones((scale, scale), dtype=bool))


def _write(image: np.ndarray, text: str, x: int, y: int, scale: int, value: float) -> None:
    stamp = _stamp(text, scale)
    target = image[max(0, y) : y + stamp.shape[0], max(0, x) : x + stamp.shape[1]]
    target[stamp[: target.shape[0], : target.shape[1]]] = value


@lru_cache(maxsize=8)
def _ramp_axis(length: int) -> np.ndarray:
    return np.linspace(-1.0, 1.0, length, dtype=F)


def _expose(film: Film, pose: Pose, T: np.ndarray, dice: Dice, noise: np.random.Generator) -> np.ndarray:
    """Film response, noise, collimation and markers."""
    low = dice.uniform(0.02, 0.09)
    high = dice.uniform(0.76, 0.93)
    gamma = dice.uniform(0.85, 1.3)
    contrast = dice.uniform(0.0, 0.5)
    grain = dice.uniform(0.008, 0.024)
    tilt_x, tilt_y = dice.uniform(-0.06, 0.06), dice.uniform(-0.06, 0.06)
    blur = dice.uniform(0.0, 0.0035)

    # One table for the whole response: toe, shoulder (a soft clip keeps detail in dense parts), gamma, contrast.
    x = np.maximum((_TONE_VALUES - F(low)) / F(high - low), F(0))
    x = (x / (F(1) + x ** F(4.5)) ** F(1 / 4.5)) ** F(gamma)
    x += F(contrast) * (x * x * (F(3) - F(2) * x) - x)
    across = F(_TONES / 1.6 * tilt_x) * _ramp_axis(film.width)
    down = F(_TONES / 1.6) * (F(1) + F(tilt_y) * _ramp_axis(film.height))
    grey = across + down[:, None]
    grey *= T
    grey = x.take(_index(grey), mode="clip")
    sigma = blur * film.scale
    if sigma > 0.25:
        grey = _box3(grey, sigma)
    # Grain is coarser where the film is dark; averaging over larger pixels lowers it.
    level = grain * (film.scale / 128) ** 0.25
    coarse = grey * F(-0.75 * 243 * level)
    coarse += F(1.25 * 243 * level)
    coarse *= _grain(noise, grey.shape)
    grey *= F(243)
    grey += F(6)
    grey += coarse

    unit = max(1, film.scale // 128)
    left, top, right, bottom = (round(margin * film.scale) for margin in pose.margins)
    shade = 4.0 + 10.0 * dice.random()
    for rows, columns in (
        (slice(None), slice(0, left)),
        (slice(None), slice(film.width - right, None)),
        (slice(0, top), slice(None)),
        (slice(film.height - bottom, None), slice(None)),
    ):
        grey[rows, columns] = shade
    letter_right = dice.chance(0.5)
    if dice.chance(0.75):
        x = left + 3 * unit if letter_right else film.width - right - 9 * unit
        _write(grey, "R" if letter_right else "L", x, top + (4 + dice.integer(6)) * unit, unit, 250.0)
    if film.scale >= 256:
        # White on a dark copy, legible on any ground.
        size = film.scale // 256
        x, y = left + 4 * size, film.height - bottom - 11 * size
        for shift_x, shift_y in ((-size, 0), (size, 0), (0, -size), (0, size)):
            _write(grey, "SYNTHETIC", x + shift_x, y + shift_y, size, 20.0)
        _write(grey, "SYNTHETIC", x, y, size, 240.0)
    return grey.clip(F(0), F(255), out=grey).astype(np.uint8)


def _grain(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1: the sum of four random bytes, close to normal and quick to draw."""
    parts = np.frombuffer(rng.bytes(4 * shape[0] * shape[1]), dtype=np.uint8).reshape(4, *shape)
    total = parts.sum(axis=0, dtype=np.int16).astype(F)
    total -= F(510)
    total *= F(1 / 147.8)
    return total


def _box3(image: np.ndarray, sigma: float) -> np.ndarray:
    """Slight symmetric blur with weights for the given standard deviation (in pixels)."""
    weight = min(0.3, 0.5 * sigma * sigma)
    if sigma > 1.0:
        return gaussian_filter(image, sigma)
    result = image * F(1 - 2 * weight)
    result[1:-1] += F(weight) * (image[2:] + image[:-2])
    result[0] += F(weight) * (image[1] + image[0])
    result[-1] += F(weight) * (image[-2] + image[-1])
    image = result * F(1 - 2 * weight)
    image[:, 1:-1] += F(weight) * (result[:, 2:] + result[:, :-2])
    image[:, 0] += F(weight) * (result[:, 1] + result[:, 0])
    image[:, -1] += F(weight) * (result[:, -2] + result[:, -1])
    return image
