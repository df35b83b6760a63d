"""Draws the synthetic radiograph: attenuation along the beam, summed structure by structure, then the film's response.

Everything is evaluated per pixel from curves of the body frame (look-up tables over u or v), so any resolution shows
the same person. Line-like structures (vessels, clavicles, bronchi) are drawn as supersampled vector graphics.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

from .phantom_anatomy import LEFT, RIGHT, Body, Dice, Pose, Thorax
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
    """Clip a temporary array to [0, 1] in place (np.clip costs several times as much on small images)."""
    np.maximum(values, F(0), out=values)
    return np.minimum(values, F(1), out=values)


class Film:
    """One image in the making: the pixel grid in body coordinates and look-up by u, by v and by side and v."""

    def __init__(self, pose: Pose, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.scale = min(height, width)
        self.matrix, self.offset = pose.matrix(height, width)
        inverse = np.linalg.inv(self.matrix)
        x, y = _pixel_centres(height, width)
        origin = -inverse @ self.offset
        self.U = ((inverse[0, 0] * x + origin[0])[None, :] + (inverse[0, 1] * y)[:, None]).astype(F)
        self.V = ((inverse[1, 0] * x + origin[1])[None, :] + (inverse[1, 1] * y)[:, None]).astype(F)
        self.A = np.abs(self.U)
        steps = 3.0 * self.scale
        self.u_low, u_high = float(self.U.min()) - 0.01, float(self.U.max()) + 0.01
        self.v_low, v_high = float(self.V.min()) - 0.01, float(self.V.max()) + 0.01
        self.steps = steps
        self.u_table = np.arange(self.u_low, u_high + 1 / steps, 1 / steps).astype(F)
        self.v_table = np.arange(self.v_low, v_high + 1 / steps, 1 / steps).astype(F)
        self.iu = ((self.U - F(self.u_low)) * F(steps)).astype(np.intp)
        self.iv = ((self.V - F(self.v_low)) * F(steps)).astype(np.intp)
        self.isv = self.iv + (self.U > 0) * np.intp(len(self.v_table))

    def by_u(self, table: np.ndarray) -> np.ndarray:
        """(H, W) values of a function tabulated over `u_table`."""
        return table.astype(F, copy=False).take(self.iu, mode="clip")

    def by_v(self, table: np.ndarray) -> np.ndarray:
        """(H, W) values of a function tabulated over `v_table`."""
        return table.astype(F, copy=False).take(self.iv, mode="clip")

    def by_side(self, right: np.ndarray, left: np.ndarray) -> np.ndarray:
        """(H, W) values of one function per side, both tabulated over `v_table`."""
        return np.concatenate([right, left]).astype(F, copy=False).take(self.isv, mode="clip")

    def window(self, u: float, v: float, radius: float) -> tuple[slice, slice]:
        """Rows and columns around a body point."""
        x, y = self.matrix @ np.array([u, v]) + self.offset
        reach = radius * np.hypot(self.matrix[0, 0], self.matrix[1, 0]) + 1.0
        rows = slice(max(0, int(y - reach)), max(0, min(self.height, int(y + reach) + 2)))
        columns = slice(max(0, int(x - reach)), max(0, min(self.width, int(x + reach) + 2)))
        return rows, columns


class Sketch:
    """A supersampled grey canvas for vector graphics in body coordinates."""

    def __init__(self, film: Film) -> None:
        self.factor = 2 if film.scale <= 640 else 1
        self.image = Image.new("L", (film.width * self.factor, film.height * self.factor))
        self.draw = ImageDraw.Draw(self.image)
        self.matrix = film.matrix * self.factor
        self.offset = film.offset * self.factor
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
        image = self.image.reduce(self.factor) if self.factor > 1 else self.image
        radius = blur * self.unit / self.factor
        if radius > 0.6:  # below that the reduction has smoothed enough
            image = image.filter(ImageFilter.BoxBlur(radius))
        return np.asarray(image, dtype=F) * F(1 / 255)


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
    lateral = film.by_side(thorax.lateral(RIGHT, vt), thorax.lateral(LEFT, vt))
    borders = thorax.medial(RIGHT, vt), thorax.medial(LEFT, vt)
    medial = film.by_side(*borders)
    au = np.abs(ut)
    floor = film.by_u(np.where(ut < 0, thorax.diaphragm(RIGHT, au), thorax.diaphragm(LEFT, au)))
    above_floor = floor - V
    inside = np.minimum(lateral - A, A - medial)
    # Above the apex both edges coincide, so the row has to be compared too.
    depth = np.minimum(np.minimum(inside, above_floor), V - F(body.apex_level))
    lung = _ramp(depth, 0.011)
    if layers is not None:
        layers["lung"] = lung.copy()

    # Soft tissue: chest wall, shoulders, arms.
    wall = body.wall
    wide = max(thorax.widths.values())
    flare = 0.5 * np.exp(-np.clip((vt - 0.22) / 0.055, 0, 20)) + 0.03 * np.clip(vt - 0.55, 0, 1)
    rim = film.by_v(wide + wall + flare) - A
    slope = np.clip(au - 0.085, 0, 1)
    shoulder_table = body.shoulder_level - 0.03 + 0.36 * slope - np.where(slope > 0, 0.3 * np.exp(-slope / 0.03), 2.0)
    top = V - film.by_u(shoulder_table)
    tissue = np.minimum(rim, top)
    arm = np.minimum(A - film.by_v(wide + wall + 0.045 + 0.12 * (vt - 0.3)), V - F(0.2))
    tissue = np.maximum(tissue, arm)
    thickness = np.sqrt(_unit(tissue * F(1 / 0.16)))
    T = _ramp(tissue, 0.008) * (F(0.20) + F(0.38) * thickness)
    T *= F(0.92) + F(0.16) * texture

    # Above the apices the middle is only neck.
    neck = 0.05 + np.clip((vt - body.apex_level - 0.07) / 0.1, 0, 1)
    central = _unit((np.minimum(medial, film.by_v(neck)) - A) * F(1 / 0.09))
    # The belly is dense in the middle and thins out towards the flanks, where wall and belly are one.
    abdomen = _unit(above_floor * F(-1 / 0.16)) * _unit((F(wide + 0.5 * wall) - A) * F(1 / 0.16))
    below = _ramp(-above_floor, 0.012) * _unit((lateral + F(0.02) - A) * F(1 / 0.05))
    T += F(0.17) * np.maximum(central * (F(2) - central), F(0.9) * abdomen)
    T += below * F(0.05)

    air = F(0.16) + F(0.25) * np.sqrt(_unit(depth * F(1 / 0.13)))
    T -= lung * air
    beating = (vt > thorax.heart_top) & (vt < thorax.heart_bottom + 0.03)
    heart = film.by_side(*(np.where(beating, border, -1.0) for border in borders))
    heart_mask = _unit(np.minimum(heart - A, above_floor + F(0.05)) * F(1 / 0.05))
    T += F(0.06) * heart_mask * _unit((V - F(thorax.heart_top + 0.02)) * F(1 / 0.13))
    if layers is not None:
        layers["heart"] = _ramp(heart - A, 0.011)

    _breasts(body, film, T)
    _bones(body, thorax, film, T, lung, lateral, above_floor, _ramp(tissue, 0.03))
    vessels = _vessels(body, thorax, film, by_class)
    _hila(body, thorax, film, T, dice)

    collapse = by_class.get("Pneumothorax")
    if collapse is not None:
        gas = _pneumothorax(thorax, film, collapse, depth)
        vessels *= F(1) - gas
        T -= gas * F(0.07)
    marks = vessels * lung
    T += marks * F(0.15)
    _airways(thorax, film, T, bubble)

    for index, finding in enumerate(findings):
        mask = _draw_finding(thorax, film, finding, T, lung, marks, texture, above_floor, dice)
        if layers is not None and mask is not None:
            layers[f"finding {index}"] = mask
    return _expose(film, pose, T, dice, noise)


def _texture(dice: Dice, film: Film) -> np.ndarray:
    """Smooth random field in [0, 1] with a few octaves, tied to the film's frame."""
    rng = np.random.default_rng(dice.integer(2**31))
    # The octaves are summed on a small grid; only the sum is brought to full size.
    field = F(0.2) * rng.random((32, 32), dtype=F)
    for cells, weight in ((5, 0.5), (12, 0.3)):
        grid = Image.fromarray(rng.random((cells, cells), dtype=F))
        field += F(weight) * np.asarray(grid.resize((32, 32), Image.Resampling.BICUBIC))
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
        radius = np.sqrt(across**2 + np.where(down < 0, F(0.45) * down, down) ** 2)
        T[window] += (
            F(0.06 + 0.08 * body.breast_size) * _ramp(1 - radius, 0.22) * np.clip(F(0.75) + F(0.4) * down, 0, 1)
        )


# Shoulder blade relative to the widest point of the rib cage, and head of the upper arm.
_BLADE = np.array([[-0.02, 0.17], [-0.035, 0.28], [0.0, 0.40], [0.02, 0.41], [0.085, 0.20]])
_TURN = np.linspace(0, 2 * np.pi, 20)
_HEAD = np.stack([0.047 * np.cos(_TURN), 0.05 * np.sin(_TURN)], axis=1)


def _rib_profile(position: np.ndarray, levels: list[float], widths: list[float], edge: float) -> np.ndarray:
    """Density over the position across the ribs: plateau with brighter cortical borders."""
    total = np.zeros_like(position)
    steps = 1.0 / float(position[1] - position[0])
    reach = int(0.75 * max(widths) * steps) + 1
    first = ((np.array(levels) - float(position[0])) * steps).astype(int) - reach
    rows = first[:, None] + np.arange(2 * reach + 2)
    share = np.abs(position.take(rows, mode="clip") - np.array(levels)[:, None]) / (0.5 * np.array(widths)[:, None])
    profile = np.clip((1.12 - share) / 0.24, 0, 1) * (0.62 + edge * np.exp(-(((share - 0.86) / 0.2) ** 2)))
    for start, row in zip(first.tolist(), profile, strict=True):
        if start >= 0:
            total[start : start + len(row)] += row[: len(total) - start]
    return total


def _bones(
    body: Body,
    thorax: Thorax,
    film: Film,
    T: np.ndarray,
    lung: np.ndarray,
    lateral: np.ndarray,
    above_floor: np.ndarray,
    skin: np.ndarray,
) -> None:
    """Ribs, spine, clavicles, shoulder blades."""
    rng = Dice(np.random.default_rng(body.seed), 96)
    A, V = film.A, film.V
    table = np.arange(-0.4, 1.3, 1 / film.steps).astype(F)
    levels, widths = [], []
    level = body.apex_level - 0.03 + body.rib_first
    for index in range(11):
        levels.append(level + rng.uniform(-0.004, 0.004))
        widths.append(body.rib_width * rng.uniform(0.9, 1.1))
        level += body.rib_spacing + body.rib_growth * index
    posterior = _rib_profile(table, levels, widths, 0.45)
    front = [level + 0.06 + body.anterior_shift for level in levels[1:8]]
    anterior = _rib_profile(table, front, [1.12 * width for width in widths[1:8]], 0.25)

    # Behind: out of the spine, slightly up, then down along the wall. In front: downwards to the midline.
    inner = A - F(0.085)
    bend = F(body.rib_slope) * inner * inner
    index = ((V - bend + F(0.4)) * F(film.steps)).astype(np.intp)
    behind = posterior.take(index, mode="clip")
    reach = F(thorax.widths[RIGHT]) - A
    bend = F(body.anterior_slope) * reach - F(0.6) * reach * reach
    index = ((V - bend + F(0.4)) * F(film.steps)).astype(np.intp)
    before = anterior.take(index, mode="clip") * _unit((A - F(0.15)) * F(1 / 0.05))

    edge = lateral - A
    cage = _unit((edge + F(0.022)) * F(1 / 0.012)) * _unit((A - F(0.035)) * F(1 / 0.02))
    # Seen along its surface at the wall, a rib is denser there.
    turn = F(1) + F(0.7) * _unit(F(1) - np.abs(edge) * F(1 / 0.05))
    cage *= np.clip((above_floor + F(0.16)) * F(1 / 0.12), F(0.25), F(1))
    density = F(body.bone_density)
    T += (F(0.098) * behind * turn + F(0.06) * before) * cage * density * (F(0.45) + F(0.55) * lung)

    # Spine: column, discs and cortical borders, in the strip of columns that holds it.
    near = np.flatnonzero(A.min(axis=0) < F(0.075))
    if len(near):
        strip = slice(near[0], near[-1] + 1)
        rows = film.iv[:, strip]
        across = np.abs(film.U[:, strip] - thorax.spine(film.v_table).astype(F).take(rows, mode="clip"))
        column = _ramp(F(0.036) - across, 0.012)
        share = (film.v_table + F(0.02)) / F(0.062)
        share = np.abs(share - np.round(share))
        disc = (0.035 * np.clip((0.17 - share) / 0.08, 0, 1)).astype(F).take(rows, mode="clip")
        border = np.exp(-(((across - F(0.034)) * F(1 / 0.006)) ** 2))
        T[:, strip] += density * (column * (F(0.06) - disc) + F(0.018) * border)

    sketch = Sketch(film)
    for side in (RIGHT, LEFT):
        wide = thorax.widths[side]
        upper, lower = thorax.clavicle(side)
        shapes = [
            _BLADE + (wide, 0.0),
            _HEAD + (wide + 0.105, 0.195),
            np.array([[wide + 0.125, 0.22], [wide + 0.20, 0.5]]),
            upper,
            lower,
        ]
        # All points in one product; the drawing calls take flat lists.
        points = np.concatenate(shapes) * (side, 1.0) @ sketch.matrix.T + sketch.offset
        cuts = np.cumsum([0, *map(len, shapes)]).tolist()
        blade, head, arm, upper, lower = (
            points[start:end].ravel().tolist() for start, end in zip(cuts, cuts[1:], strict=False)
        )
        border = max(1, round(0.004 * sketch.unit))
        draw = sketch.draw
        draw.polygon(blade, fill=42)
        draw.line(blade[:8], fill=70, width=max(1, round(0.006 * sketch.unit)))
        draw.polygon(head, fill=65)
        draw.line(arm, fill=80, width=max(1, round(0.05 * sketch.unit)))
        outline = points[cuts[3] : cuts[4]].ravel().tolist() + points[cuts[4] :][::-1].ravel().tolist()
        draw.polygon(outline, fill=150)
        draw.line(upper, fill=215, width=border)
        draw.line(lower, fill=215, width=border)
    T += sketch.result(0.0025) * skin * F(0.22 * density)


def _vessels(body: Body, thorax: Thorax, film: Film, by_class: dict[str, Finding]) -> np.ndarray:
    """Branching vessels from both hila, thick to thin."""
    sketch = Sketch(film)
    rng = np.random.default_rng([body.seed, 1])
    edema = by_class.get("Edema")
    swell = 1.0 if edema is None else 1.15 + 0.12 * edema.severity
    # Both sides grow together: arrays hold the branches of the right, then of the left lung.
    count = 9
    sides = np.repeat([RIGHT, LEFT], count)
    hila = np.where(sides == RIGHT, thorax.hila[RIGHT], thorax.hila[LEFT])
    # Directions from upwards over lateral to downwards; 0 points laterally.
    angle = np.tile(np.linspace(-1.32, 1.35, count), 2) + rng.uniform(-0.12, 0.12, 2 * count)
    start = np.stack([thorax.hilum_offset - 0.03 + 0.02 * rng.random(2 * count), hila + 0.045 * np.sin(angle)], axis=1)
    length = (0.05 + 0.03 * rng.random(2 * count)) * (1.0 + 0.25 * np.abs(np.sin(angle)))
    width = 0.0125 * (0.75 + 0.45 * rng.random(2 * count)) * swell * body.vessel_density
    draw = sketch.draw.line
    for value, halves in ((200, 2), (165, 2), (130, 4)):
        # The finest branches get more bends instead of children.
        path = [start]
        for half in range(halves):
            if half:
                angle = angle + rng.uniform(-0.35, 0.35, len(angle))
            path.append(path[-1] + (0.5 * length)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        lines = np.stack(path, axis=1)
        lines[:, :, 0] *= sides[:, None]
        pixels = (lines @ sketch.matrix.T + sketch.offset).reshape(len(lines), -1).tolist()
        widths = np.maximum(1, np.rint(width * sketch.unit)).astype(int).tolist()
        for line, thick in zip(pixels, widths, strict=True):
            draw(line, fill=value, width=thick)
        spread = rng.uniform(0.22, 0.5, len(angle))
        angle = np.concatenate([angle - spread * 0.6, angle + spread])
        start = np.concatenate([path[-1], path[-1]])
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
            square = ((film.U[window] - F(u)) ** 2 + F(0.6) * (film.V[window] - F(v)) ** 2) * F(1 / radius**2)
            T[window] += F(strength) * np.exp(-square * square)


def _airways(thorax: Thorax, film: Film, T: np.ndarray, bubble: tuple | None) -> None:
    """Trachea, main bronchi and the gastric bubble: darker than what surrounds them."""
    sketch = Sketch(film)
    centre, carina = thorax.trachea_centre(), thorax.carina
    sketch.line(np.array([[centre + 0.004, -0.3], [centre, 0.2], [centre, carina - 0.008]]), 0.034, 150)
    right = np.array([[centre, carina - 0.012], [centre - 0.04, carina + 0.03], [centre - 0.07, carina + 0.055]])
    left = np.array([[centre, carina - 0.012], [centre + 0.05, carina + 0.028], [centre + 0.085, carina + 0.045]])
    sketch.line(right, 0.023, 75)
    sketch.line(left, 0.02, 65)
    if bubble is not None:
        u, v, radius_u, radius_v = bubble
        angle = np.linspace(0, 2 * np.pi, 28)
        sketch.polygon(np.stack([u + radius_u * np.cos(angle), v + radius_v * np.sin(angle)], axis=1), 210)
    T -= sketch.result(0.004) * F(0.24)


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


def _expose(film: Film, pose: Pose, T: np.ndarray, dice: Dice, noise: np.random.Generator) -> np.ndarray:
    """Film response, noise, collimation and markers."""
    low = dice.uniform(0.02, 0.09)
    high = dice.uniform(0.76, 0.93)
    gamma = dice.uniform(0.85, 1.3)
    contrast = dice.uniform(0.0, 0.5)
    grain = dice.uniform(0.008, 0.024)
    tilt_x, tilt_y = dice.uniform(-0.06, 0.06), dice.uniform(-0.06, 0.06)
    blur = dice.uniform(0.0, 0.0035)

    exposure = (
        np.linspace(-tilt_x, tilt_x, film.width, dtype=F)[None]
        + np.linspace(-tilt_y, tilt_y, film.height, dtype=F)[:, None]
    )
    # One table for the whole response: toe, shoulder (a soft clip keeps detail in dense parts), gamma, contrast.
    x = np.clip((np.arange(_TONES, dtype=F) / F(_TONES / 1.6) - F(low)) / F(high - low), 0, None)
    x = (x / (1.0 + x**4.5) ** (1 / 4.5)) ** gamma
    x += contrast * (x * x * (3.0 - 2.0 * x) - x)
    response = x.astype(F)
    grey = T * (F(_TONES / 1.6) * (F(1) + exposure))
    grey = response.take(grey.astype(np.intp), mode="clip")
    sigma = blur * film.scale
    if sigma > 0.25:
        grey = _box3(grey, sigma)
    # Grain is coarser where the film is dark; averaging over larger pixels lowers it.
    level = grain * (film.scale / 128) ** 0.25
    grey = grey + _grain(noise, grey.shape) * (F(level) * (F(1.25) - F(0.75) * grey))
    grey = F(6) + grey * F(243)

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
    return np.clip(grey, F(0), F(255)).astype(np.uint8)


def _grain(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1: the sum of four random bytes, close to normal and quick to draw."""
    parts = np.frombuffer(rng.bytes(4 * shape[0] * shape[1]), dtype=np.uint8).reshape(4, *shape)
    total = parts[0].astype(np.int16)
    for part in parts[1:]:
        total += part
    return (total - np.int16(510)) * F(1 / 147.8)


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
