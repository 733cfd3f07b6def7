"""Procedural 32x32 RGB pictures of ten shapes; one knob says how hard they are to tell apart.

A picture is a pure function of (seed, index, difficulty): pictures can be drawn in any order, in
any number, on any machine. Difficulty 0 is a bright, upright, centred shape on a dark ground;
towards 1 come rotation, shift, weak colour contrast, clutter and pixel noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SIZE = 32
CLUTTER = 6
# draws of one picture: 16 for the shape, 8 for each piece of clutter, then the pixel noise
_CLUTTER_START, _CLUTTER_DRAWS = 16, 8
_NOISE_START = _CLUTTER_START + CLUTTER * _CLUTTER_DRAWS
# pictures drawn at once: keeps the noise's counters below 100 MB
_CHUNK = 1024

Field = np.ndarray


def _hash(x: Field) -> Field:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters counters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, index: Field, draw: Field) -> Field:
    """Numbers in [0, 1) from the counters (seed, index, draw), which broadcast."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _hash(np.array([seed], dtype=np.uint64) + golden)
        key = _hash(key + index.astype(np.uint64) * golden)
        word = _hash(key + (draw.astype(np.uint64) + np.uint64(1)) * golden)
    return ((word >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def _box(u: Field, v: Field, half_u: float, half_v: float) -> Field:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _triangle(u: Field, v: Field) -> Field:
    side = np.float32(np.sqrt(3) / 2)
    return np.maximum(np.maximum(side * u + 0.5 * v, -side * u + 0.5 * v), -v) - 0.5


def _star(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - (0.62 + 0.38 * np.cos(5 * np.arctan2(v, u)))


# name -> signed distance (negative inside) at the shape's own coordinates, its radius being 1.
# No two are equal up to rotation: rotation is part of the difficulty.
SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "triangle": _triangle,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.2,
    "star": _star,
    "bar": lambda u, v: _box(u, v, 1.0, 0.3),
    "half disc": lambda u, v: np.maximum(np.hypot(u, v) - 1.0, v),
    "two dots": lambda u, v: np.hypot(np.abs(u) - 0.62, v) - 0.36,
    "frame": lambda u, v: np.abs(_box(u, v, 0.62, 0.62)) - 0.18,
}


def labels(index: Field, classes: int) -> Field:
    """Classes take turns: any run of ``classes`` indices holds each of them once."""
    return (index % classes).astype(np.int64)


def _coverage(distance: Field, radius: Field | float) -> Field:
    """Share of a pixel inside: a ramp one pixel wide around the outline."""
    return np.clip(0.5 - distance * radius, 0.0, 1.0)


def _local(grid: tuple[Field, Field], x: Field, y: Field, angle: Field, radius: Field):
    """Pixel coordinates seen from a shape at (x, y), turned and scaled: two [N, 32, 32]."""
    dx, dy = grid[0] - x, grid[1] - y
    cos, sin = np.cos(angle), np.sin(angle)
    return (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius


def _draw(index: Field, classes: int, seed: int, difficulty: float) -> Field:
    """Pictures [N, 3, 32, 32] of the given indices."""

    def pick(draw: int, low: float, high: float) -> Field:  # [N, 1, 1]
        share = uniform(seed, index, np.array([draw]))
        return (low + (high - low) * share)[:, None, None]

    axis = np.arange(SIZE, dtype=np.float32)
    grid = (axis[None, None, :], axis[None, :, None])
    middle = (SIZE - 1) / 2

    ground = np.stack([pick(d, 0.0, 0.1 + 0.5 * difficulty) for d in (0, 1, 2)], axis=1)
    colour = np.stack([pick(d, 0.0, 1.0) for d in (3, 4, 5)], axis=1)
    # the contrast is what separates the shape from its ground in at least one colour channel
    away = np.where(ground < 0.5, 1.0, -1.0)
    contrast = 0.9 - 0.6 * difficulty
    image = np.broadcast_to(ground, (len(index), 3, SIZE, SIZE)).copy()

    for piece in range(round(CLUTTER * difficulty)):
        at = _CLUTTER_START + piece * _CLUTTER_DRAWS
        x, y = pick(at, 0, SIZE - 1), pick(at + 1, 0, SIZE - 1)
        u, v = _local(grid, x, y, pick(at + 2, 0.0, np.pi), pick(at + 3, 2.0, 5.0))
        cover = _coverage(_box(u, v, 1.0, 0.25), 3.0)[:, None]
        tint = np.stack([pick(at + 4 + c, 0.0, 0.7) for c in range(3)], axis=1)
        image += cover * (tint - image)

    shift = 6.0 * difficulty
    radius = pick(6, 10.0 - 4.0 * difficulty, 12.0 - 2.0 * difficulty)
    x = middle + pick(7, -shift, shift)
    y = middle + pick(8, -shift, shift)
    u, v = _local(grid, x, y, pick(9, -np.pi, np.pi) * difficulty, radius)
    distance = np.empty_like(u)
    for number, outline in enumerate(list(SHAPES.values())[:classes]):
        rows = labels(index, classes) == number
        distance[rows] = outline(u[rows], v[rows])
    cover = _coverage(distance, radius)[:, None]
    paint = np.clip(ground + away * contrast * (0.4 + 0.6 * colour), 0.0, 1.0)
    image += cover * (paint - image)

    draws = _NOISE_START + np.arange(3 * SIZE * SIZE).reshape(3, SIZE, SIZE)
    # sqrt(12) turns the uniform's spread into a standard deviation
    noise = uniform(seed, index[:, None, None, None], draws) - 0.5
    return image + noise * np.float32(np.sqrt(12) * 0.25 * difficulty)


def shapes(
    start: int, count: int, *, classes: int = 10, difficulty: float = 0.5, seed: int = 0
) -> tuple[Field, Field]:
    """Pictures ``start`` to ``start + count - 1`` and their classes.

    Args:
        classes: 2 to 10, the first so many of ``SHAPES``.
        difficulty: 0 (easy) to 1 (hard).

    Returns:
        x float32 [N, 3, 32, 32], about 0 to 1 before the noise; y int64 [N].
    """
    if not 2 <= classes <= len(SHAPES):
        raise ValueError(f"shapes: classes must be in 2..{len(SHAPES)}, got {classes}")
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"shapes: difficulty must be in [0, 1], got {difficulty}")
    index = np.arange(start, start + count)
    parts = [index[i : i + _CHUNK] for i in range(0, count, _CHUNK)]
    images = [_draw(part, classes, seed, difficulty).astype(np.float32) for part in parts]
    return np.concatenate(images), labels(index, classes)
