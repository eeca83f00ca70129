"""Painters: an object cut out of its ground becomes a picture in one of six styles.

Each painter takes a `Scene` (the object's colours and its coverage on a square canvas, floats in [0, 1]) and returns
float RGB [side, side, 3]. Lengths are in `unit`s, 1/128 of the side, so that a picture looks the same at every size.
Only NumPy and Pillow are used, and every stroke is a row of an array: a picture takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]  # float32


class Scene(NamedTuple):
    """What a painter sees."""

    colour: Array  # [side, side, 3], the object over the ground, in [0, 1]
    cover: Array  # [side, side], 1 where the object is
    ground: Array  # [3], the ground's colour
    rng: np.random.Generator

    @property
    def side(self) -> int:
        return self.cover.shape[0]

    @property
    def unit(self) -> float:
        return self.side / 128


@lru_cache(maxsize=64)
def _gaussian(side: int, sigma: float) -> Array:
    """A matrix [side, side] that blurs the row it is applied to; the edge pixel goes on beyond the edge."""
    reach = int(3 * sigma) + 1
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((side, side))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.clip(np.arange(side) + offset, 0, side - 1), np.arange(side)), weight)
    return matrix.astype(np.float32)


def _blur(image: Array, sigma: float) -> Array:
    """Gaussian blur of [side, side] or [side, side, channels], sigma in pixels."""
    side = image.shape[0]
    matrix = _gaussian(side, round(float(sigma), 3))
    planes = image if image.ndim == 2 else np.moveaxis(image, -1, 0)
    # Products small enough that BLAS starts no threads for them: on a busy machine those cost fifty times the work.
    rows = next((n for n in (8, 4, 2) if side % n == 0 and n * side * side < 2**18), 1)
    for _ in range(2):  # along y, then along x
        blocks = np.ascontiguousarray(planes.swapaxes(-1, -2)).reshape(-1, rows, side)
        planes = (blocks @ matrix).reshape(planes.shape)
    return planes if image.ndim == 2 else np.moveaxis(planes, 0, -1)


def _clouds(rng: np.random.Generator, side: int, cells: int) -> Array:
    """Smooth noise of about unit variance with `cells` bumps across the side."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    wide = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC, (1, 1, cells + 2, cells + 2))
    return 1.3 * np.asarray(wide)


def _grain(rng: np.random.Generator, side: int, sigma: float) -> Array:
    """Noise of about unit variance with grains of `sigma` pixels."""
    return 2.5 * sigma * _blur(rng.standard_normal((side, side), np.float32), sigma)


def _warp(image: Array, dy: Array, dx: Array) -> Array:
    """`image` [side, side, ...] read at (y + dy, x + dx), bilinear, clamped at the edges."""
    side = image.shape[0]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    y, x = np.clip(y + dy, 0, side - 1.001), np.clip(x + dx, 0, side - 1.001)
    y0, x0 = y.astype(np.intp), x.astype(np.intp)
    fy, fx = y - y0, x - x0
    if image.ndim == 3:
        fy, fx = fy[..., None], fx[..., None]
    top = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
    low = image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + low * fy


def _luminance(colour: Array) -> Array:
    return colour @ np.array([0.299, 0.587, 0.114], np.float32)


def _slope(image: Array) -> tuple[Array, Array]:
    """(d/dy, d/dx) by central differences."""
    padded = np.pad(image, 1, mode="edge")
    return (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2, (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2


def plain(scene: Scene) -> Array:
    """The object as it is, with a soft shadow on an even ground."""
    side, unit = scene.side, scene.unit
    shadow = _blur(np.roll(scene.cover, int(3 * unit), axis=0), 3 * unit) * (1 - scene.cover)
    light = 1.03 - 0.06 * np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    return scene.colour * (1 - 0.28 * shadow[..., None]) * (1 + (light - 1) * (1 - scene.cover[..., None]))


CELLS = 16  # of pixel art, across the picture: a sprite's, and whole pixels at every usual size


def pixel(scene: Scene) -> Array:
    """A coarse grid of flat cells in few colours, the object outlined, the ground with a dithered floor."""
    side, cells, colours = scene.side, CELLS, 16
    cover = scene.cover > 0.6
    flat = Image.fromarray((np.clip(scene.colour[cover][None], 0, 1) * 255).astype(np.uint8))
    flat = flat.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    hue = np.asarray(flat).astype(int)[0]
    palette = np.array(flat.getpalette(), np.float32).reshape(-1, 3)[:colours] / 255
    index = np.arange(side) * cells // side
    cell = index[:, None] * cells + index
    area = np.bincount(cell.ravel(), minlength=cells * cells)
    inside = (np.bincount(cell.ravel(), scene.cover.ravel(), cells * cells) / area > 0.42).reshape(cells, cells)
    # Each cell takes its commonest colour, rare colours counting for more: eyes stay eyes, where a mean turns to mud.
    share = np.bincount(hue, minlength=colours) / max(len(hue), 1)
    votes = np.bincount(cell[cover] * colours + hue, minlength=cells * cells * colours).reshape(-1, colours)
    chosen = palette[(votes * (share + 0.02) ** -0.35).argmax(1)].reshape(cells, cells, 3)
    y, x = np.mgrid[:cells, :cells]
    floor = (y >= cells - 2) | ((y >= cells - 4) & ((x + y) % 2 == 0))
    near = np.pad(inside, 1)
    beside = (near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]) & ~inside
    grid = np.where(inside[..., None], chosen, scene.ground * (1 - 0.1 * floor[..., None]))
    grid = np.where(beside[..., None], 0.4 * scene.ground, grid).astype(np.float32)
    return grid[index][:, index]


class _Brush(NamedTuple):
    length: float  # of a stroke, units
    width: float
    step: float  # between strokes
    detail: float  # strokes are laid where the picture has at least so much, between 0 and 1.3
    uneven: float  # spread of the strokes' brightness


_BRUSHES = (
    _Brush(32, 9.5, 6.5, -1, 0.05),
    _Brush(17, 5.2, 4.2, 0.1, 0.06),
    _Brush(9, 2.9, 2.7, 0.32, 0.05),
    _Brush(5, 1.6, 1.6, 0.62, 0.02),
)


def oil(scene: Scene) -> Array:
    """Strokes that bend with the form, large brushes first, with bristles, impasto light and the weave of the canvas.

    Layers from large to small brushes, strokes along the edges: A. Hertzmann, "Painterly Rendering with Curved Brush
    Strokes of Multiple Sizes", 1998. The directions are those of the smoothed structure tensor.
    """
    rng, side, unit, cover = scene.rng, scene.side, scene.unit, scene.cover
    shadow = _blur(np.roll(cover, (int(4 * unit), int(3 * unit)), (0, 1)), 4 * unit) * (1 - cover)
    mood = 1 + (0.06 * _clouds(rng, side, 3) - 0.3 * shadow) * (1 - cover)
    colour = np.clip(scene.colour * mood[..., None], 0, 1)

    gy, gx = _slope(_blur(_luminance(colour) + 0.7 * cover, 1.2 * unit))
    flow, weak = np.pi * (0.2 + 0.22 * _clouds(rng, side, 2)), 3e-4 / unit**2  # the direction where nothing gives one
    xx = _blur(gx * gx, 2.5 * unit) + weak * np.sin(flow) ** 2
    yy = _blur(gy * gy, 2.5 * unit) + weak * np.cos(flow) ** 2
    xy = _blur(gx * gy, 2.5 * unit) - weak * np.sin(flow) * np.cos(flow)
    angle = 0.5 * np.arctan2(2 * xy, xx - yy) + np.pi / 2
    detail = np.clip(_blur(np.hypot(gx, gy), unit) * 12 * unit, 0, 1) + 0.3 * _blur(cover, 1.5 * unit)

    fine = 1.5  # painted so much larger and then reduced, which smooths the strokes' edges
    wide = round(side * fine)
    canvas = np.broadcast_to(np.append(scene.ground * 0.85, 0), (wide, wide, 4)).astype(np.float32)
    for brush in _BRUSHES:
        n = int(128 / brush.step)
        y, x = (np.mgrid[:n, :n].reshape(2, -1) + rng.uniform(0, 1, (2, n * n))) * (side - 1) / n
        chosen = rng.permutation(n * n)
        chosen = chosen[detail[y[chosen].astype(int), x[chosen].astype(int)] > brush.detail]
        y, x = y[chosen], x[chosen]
        at = y.astype(int), x.astype(int)
        theta, third = angle[at], brush.length * unit / 3
        ahead = np.clip([y + third * np.sin(theta), x + third * np.cos(theta)], 0, side - 1).astype(int)
        turn = (angle[ahead[0], ahead[1]] - theta + np.pi / 2) % np.pi - np.pi / 2  # an axis has no sign
        tint = _blur(colour, max(0.28 * brush.width, 0.5) * unit)[at]
        tint = tint * (1 + brush.uneven * rng.standard_normal((len(y), 1), np.float32))
        tint += 0.012 * rng.standard_normal((len(y), 3), np.float32)
        theta = theta + 0.1 * rng.standard_normal(len(y), np.float32)
        curve = np.clip(turn, -0.6, 0.6) / (third * fine)
        strokes = np.stack([y * fine, x * fine, theta, curve])
        _lay(canvas, strokes, tint, brush.length * unit * fine, brush.width * unit * fine, rng)
    gy, gx = _slope(_blur(canvas[..., 3], 0.6 * unit * fine))
    lit = canvas[..., :3] * (1 + 0.35 * np.clip((gx + gy) * unit * fine, -0.35, 0.35))[..., None]
    reduced = Image.fromarray((np.clip(lit, 0, 1) * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BOX)
    y, x = np.mgrid[:side, :side].astype(np.float32) * np.float32(np.pi / 3 / unit)
    weave = 1 + 0.022 * (np.sin(2 * x) * np.cos(y) + np.cos(x) * np.sin(2 * y))
    return np.asarray(reduced, np.float32) / 255 * weave[..., None]


def _lay(canvas: Array, strokes: Array, tint: Array, length: float, width: float, rng: np.random.Generator) -> None:
    """Lays strokes, later ones over earlier ones, onto `canvas` [wide, wide, 4]: colour and height of the paint.

    strokes: centre y and x (pixels), direction and curvature (1 / radius) [4, n]; tint: their colours [n, 3].
    Each stroke is a cloud of points dense enough to leave no gap, so all strokes of a layer are one array.
    """
    across = np.arange(-width / 2, width / 2, 0.68).astype(np.float32)
    along = np.arange(-length / 2, length / 2, 0.68).astype(np.float32)
    ends = length / 2 * (1 - 0.22 * rng.random(len(across), np.float32) - 0.25 * np.abs(2 * across / width) ** 3)
    lane, step = np.nonzero(np.abs(along) <= ends[:, None])
    u, v = along[step], across[lane]
    pad = int(0.75 * length + width / 2) + 2
    wide = canvas.shape[0] + 2 * pad
    y, x, theta, curve = strokes.astype(np.float32)[..., None]
    c, s, side = np.cos(theta), np.sin(theta), v + curve * u * u / 2
    rows, columns = (y + u * s + side * c + pad).astype(np.int32), (x + u * c - side * s + pad).astype(np.int32)
    top = np.full(wide * wide, -1, np.int32)
    top[(rows * wide + columns).ravel()] = np.arange(rows.size, dtype=np.int32)  # the last one written is uppermost
    top = top.reshape(wide, wide)[pad:-pad, pad:-pad]
    seen = top >= 0
    stroke, point = np.divmod(top[seen], len(u))
    bristles = rng.standard_normal((8, len(across)), np.float32)[stroke % 8, lane[point]]
    rim = np.minimum(1 - np.abs(2 * v / width), 0.35)[point]
    height = 0.16 * bristles + 2.2 * rim + 0.2 * (u / length)[point]
    canvas[seen] = np.column_stack([tint[stroke] * (1 + 0.03 * bristles)[:, None], height])


def pencil(scene: Scene) -> Array:
    """Graphite on tinted paper: contours drawn twice, cross-hatching by tone, white chalk in the lights.

    The contours are differences of Gaussians, sharpened: H. Winnemöller et al., "XDoG", 2012.
    """
    rng, side, unit = scene.rng, scene.side, scene.unit
    tooth = _grain(rng, side, 0.6 * unit)
    paper = 0.92 * scene.ground + 0.08 * scene.ground.mean()  # dyed paper is duller and paler than paint
    sheet = (0.17 + 0.81 * paper) * (1 + 0.03 * tooth + 0.012 * _clouds(rng, side, 5))[..., None]
    light = _luminance(scene.colour) * scene.cover + 0.9 * (1 - scene.cover)
    inside = scene.cover > 0.5
    low, high = np.quantile(light[inside], (0.05, 0.95)) if inside.any() else (0.0, 1.0)
    tone = 1 - np.clip((light - low) / max(high - low, 0.25), 0, 1)  # the object's own darks are the darkest
    tone = 0.75 * _blur(tone, 0.9 * unit) + 0.25 * np.clip(1 - light, 0, 1)
    y, x = np.mgrid[:side, :side].astype(np.float32) / unit
    wave, press = 0.9 * _clouds(rng, side, 4), 1 + 0.18 * _clouds(rng, side, 7)

    def hatch(angle: float, period: float, strength: Array) -> Array:
        """Lines whose width and darkness grow with `strength` [side, side]."""
        across = (x * np.cos(angle) + y * np.sin(angle) + wave) / period
        line = 1 - 2 * np.abs(across - np.floor(across) - 0.5)  # 1 in the middle of a line, 0 between two
        return np.clip((line - 0.72 + 0.55 * strength) * 2.2, 0, 1) * (0.35 + 0.5 * strength) * (strength > 0.02)

    cover = scene.cover
    dark = 0.16 * tone * cover
    for angle, period, level, gain in ((0.72, 3.4, 0.14, 1.3), (-0.62, 3.6, 0.46, 1.7), (0.05, 3.2, 0.74, 2.4)):
        dark += (1 - dark) * press * hatch(angle, period, np.clip((tone - level) * gain, 0, 1) * cover)
    shift = int(5 * unit)
    cast = np.clip(_blur(np.roll(cover, (shift, shift), (0, 1)), 1.5 * unit) - cover, 0, 1)
    dark += 0.7 * hatch(0.72, 3.4, 0.5 * cast)
    drawn = np.concatenate([scene.colour * cover[..., None], cover[..., None]], -1)
    edges = np.abs(_blur(drawn, 0.7 * unit) - _blur(drawn, 1.3 * unit)).max(-1)
    for weight in (1.0, 0.45):
        wander = 0.6 * unit * _clouds(rng, side, 5)
        dark += weight * np.clip(_warp(edges, wander, -wander) * 6 - 0.2, 0, 0.8) * press
    dark = np.clip(dark, 0, 1) * np.clip(0.93 + 0.16 * tooth, 0.3, 1)
    chalk = hatch(0.72, 3.4, np.clip((0.2 - tone) * 4, 0, 1) * cover) + 0.35 * np.clip((0.25 - tone) * 4, 0, 1) * cover
    sheet = sheet + (0.99 - sheet) * np.clip(chalk * (0.9 + 0.15 * tooth), 0, 0.9)[..., None]
    return sheet + (np.array([0.16, 0.16, 0.19], np.float32) - sheet) * 0.86 * dark[..., None]


def watercolour(scene: Scene) -> Array:
    """Transparent washes on rough paper: bleeding and dried rims, granulation, drops, a margin left white.

    The picture is kept as optical depth, -log of the light that passes, in which washes add up (Beer, Lambert);
    rims and granulation follow A. Bousseau et al., "Interactive watercolor rendering", 2006.
    """
    rng, side, unit = scene.rng, scene.side, scene.unit
    tooth = _grain(rng, side, 0.75 * unit)
    dy, dx = 0.9 * unit * _clouds(rng, side, 6), 0.9 * unit * _clouds(rng, side, 6)
    layers = _warp(np.concatenate([_blur(scene.colour, 0.6 * unit), scene.cover[..., None]], -1), dy, dx)
    colour, cover = np.clip(layers[..., :3], 0.03, 1), layers[..., 3]
    light = _luminance(colour)
    levels = light * 5 + 0.35 * _clouds(rng, side, 4) * cover
    glazed = _blur((np.floor(levels) + 0.5) / 5, 0.5 * unit)  # tones come in steps, one glaze over the other
    glaze = 1 + 0.45 * cover * (np.clip(glazed / np.maximum(light, 0.05), 0.6, 1.5) - 1)
    colour = np.clip(colour * glaze[..., None], 0.03, 1)

    depth = -np.log(colour)
    wet = np.clip(0.35 + 0.55 * _clouds(rng, side, 3), 0, 1)
    shore = np.clip(1.2 - np.abs(_blur(cover, 3 * unit) - 0.4) * 2.4, 0, 1)  # 1 near the outline
    depth += (_blur(depth, 3.2 * unit) - depth) * (0.75 * wet * shore)[..., None]
    edges = np.concatenate([colour, cover[..., None]], -1)
    rim = np.abs(_blur(edges, 0.6 * unit) - _blur(edges, 1.8 * unit)).max(-1) * (1 - 0.8 * wet)
    flow = 0.9 + 0.15 * _clouds(rng, side, 4) + 0.08 * _clouds(rng, side, 9)
    dry = np.clip(1 - np.abs(_blur(cover, 0.8 * unit) - 0.25) * 5, 0, 1) * (1 - wet) ** 2  # paper between two washes
    density = np.clip(flow, 0.55, 1.3) * (1 - 0.55 * dry) + 1.1 * rim

    y, x = np.mgrid[:side, :side].astype(np.float32) / unit
    margin = np.minimum(np.minimum(x, 127 - x), np.minimum(y, 127 - y)) - 5
    margin += 0.8 * _clouds(rng, side, 5) + 0.5 * _clouds(rng, side, 20)
    density *= np.clip(margin / 1.2 + 0.5, 0, 1) * (1 + 0.55 * np.exp(-np.clip(margin, 0, None) / 1.3))
    for _ in range(5):
        centre, radius = rng.uniform(8, 120, 2), rng.uniform(0.8, 2.2)
        away = np.hypot(y - centre[0], x - centre[1]) / radius
        density += 0.3 * (np.clip(1.5 - away, 0, 1) - 0.5 * np.clip(1 - away, 0, 1)) * (1 - cover)
    density *= 1 + 0.09 * tooth
    paper = np.array([0.99, 0.985, 0.965], np.float32) * (1 + 0.01 * tooth)[..., None]
    return paper * np.exp(-depth * density[..., None])


def glass(scene: Scene) -> Array:
    """Panes of lit glass between lead, which follows the object's outline and the borders of its colours."""
    rng, side, unit, cover = scene.rng, scene.side, scene.unit, scene.cover
    behind, lead_behind = _panes(rng, side, 3)
    smooth = (np.clip(_blur(scene.colour, 1.3 * unit), 0, 1) * 255).astype(np.uint8)
    hues = np.asarray(Image.fromarray(smooth).quantize(8, Image.Quantize.MEDIANCUT)).astype(int)
    inside = cover > 0.5
    region = np.where(inside, 9 + hues, behind)  # below 9 + 8
    count = np.bincount(region.ravel(), minlength=17)
    total = np.stack([np.bincount(region.ravel(), scene.colour[..., c].ravel(), 17) for c in range(3)], -1)
    mean = (total / np.maximum(count, 1)[:, None])[region].astype(np.float32)

    large = inside & (count[region] > 16 * unit * unit)  # lead around a speck would swallow it
    cuts = np.zeros((side, side), np.float32)
    cuts[:, 1:] = _apart(mean[:, 1:], mean[:, :-1]) & large[:, 1:] & large[:, :-1]
    cuts[1:] += _apart(mean[1:], mean[:-1]) & large[1:] & large[:-1]
    outline = np.hypot(*_slope(_blur(cover, 0.75 * unit))) * unit
    lead = np.where(inside, 0, lead_behind)
    lead = np.maximum(lead, 1.2 * unit * _blur(np.minimum(cuts, 1), 0.8 * unit))
    lead = np.clip(np.maximum(lead, 2.3 * outline - 0.1), 0, 1)

    shade = 1 + 0.07 * rng.standard_normal((17, 1), np.float32)[region]
    streaks = 1 + 0.05 * _warp(_clouds(rng, side, 16), 5 * unit * _clouds(rng, side, 4), np.zeros_like(cover))
    glow = 1.18 - 0.5 * np.clip(_blur(lead, 2.6 * unit), 0, 1)
    pane = (0.55 * mean + 0.45 * scene.colour) * shade * (streaks * glow)[..., None]
    grey = pane.mean(-1, keepdims=True)
    pane = np.clip(grey + 1.15 * (pane - grey), 0, 1)
    gy, gx = _slope(_blur(lead, 0.7 * unit))
    metal = np.clip(0.1 - 0.5 * (gx + gy), 0.04, 0.3)  # lit from the top left
    return pane + (metal[..., None] - pane) * lead[..., None]


def _apart(colour: Array, other: Array) -> NDArray[np.bool_]:
    return np.abs(colour - other).max(-1) > 0.16


def _panes(rng: np.random.Generator, side: int, n: int) -> tuple[NDArray[np.intp], Array]:
    """Voronoi cells of n × n points, each in its square: the numbers of the cells and the lead between them."""
    place = rng.uniform(0.12, 0.88, (2, n, n)).astype(np.float32) + np.mgrid[:n, :n]
    axis = (np.arange(side, dtype=np.float32) + 0.5) * n / side  # in squares
    square = axis.astype(int)
    first = np.full((side, side), np.inf, np.float32)
    second, label = first.copy(), np.zeros((side, side), int)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            row, column = np.clip(square + dy, 0, n - 1)[:, None], np.clip(square + dx, 0, n - 1)
            away = np.hypot(place[0, row, column] - axis[:, None], place[1, row, column] - axis)
            number = row * n + column
            nearer = away < first
            second = np.where(nearer, first, np.where(number == label, second, np.minimum(second, away)))
            label, first = np.where(nearer, number, label), np.minimum(first, away)
    gap = (second - first) * 128 / n  # about twice the way to the border, units
    return label, np.clip(1.8 - gap / 2, 0, 1)


PAINTERS: dict[str, Callable[[Scene], Array]] = {
    "plain": plain,
    "oil": oil,
    "pencil": pencil,
    "watercolour": watercolour,
    "pixel": pixel,
    "glass": glass,
}
