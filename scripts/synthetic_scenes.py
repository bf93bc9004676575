"""Scenes of random shapes with exact instance labels: the training data of the small base SAM.

scene(rng, size) -> image uint8 [size, size, 3], labels uint8 [size, size] (0 background, k = visible part of shape k).

A scene is a textured background and 2..12 ellipses, polygons, stars, bars and blobs of log-uniform size. Each has a
colour of its own, and later ones hide earlier ones. Then come blur, sensor noise and, for a third of the scenes, gray.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

MIN_VISIBLE = 60  # pixels; what is left of a shape below this is not prompted for


def smooth_field(rng, size):
    """Noise of zero mean and unit range: a linear gradient, stripes, or low-frequency noise."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    kind = rng.integers(3)
    if kind == 0:
        return along
    if kind == 1:
        return 0.5 * np.sin(2 * np.pi * rng.uniform(3, 16) * along)
    cells = int(rng.integers(3, 24))
    noise = Image.fromarray(rng.uniform(-0.5, 0.5, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.BICUBIC))


def outline(rng, radius):
    """Corners of one shape about the origin, [n, 2]: all shapes are polygons in polar form, stretched and turned."""
    kind = rng.integers(4)
    if kind == 0:  # ellipse
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        r = np.ones_like(t)
    elif kind == 1:  # polygon, convex or not
        n = int(rng.integers(3, 9))
        t = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / n
        r = rng.uniform(0.6, 1.2, n)
    elif kind == 2:  # blob: a few harmonics
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        r = 1 + sum(rng.uniform(0, 0.4 / k) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    else:  # bar
        t = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi
        r = np.full(4, 1.2)
    p = radius * r[:, None] * np.stack([np.cos(t), np.sin(t)], -1)
    p[:, 1] *= rng.uniform(0.35, 1.0)
    a = rng.uniform(0, 2 * np.pi)
    return p @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


def scene(rng, size):
    """One image and its labels; the same `rng` state gives the same scene."""
    fields = [smooth_field(rng, size) for _ in range(3)]
    ground = rng.uniform(0, 255, 3)
    image = np.empty((size, size, 3), np.float32)
    image[:] = ground
    image += (rng.uniform(0, 90) * fields[0])[..., None] * rng.uniform(0.3, 1, 3)
    labels = np.zeros((size, size), np.uint8)
    largest = rng.uniform(0.12, 0.35) * size
    for k in range(1, int(rng.integers(2, 13)) + 1):
        radius = np.exp(rng.uniform(np.log(0.06 * size), np.log(largest)))
        corners = outline(rng, radius) + rng.uniform(0, size, 2)
        canvas = Image.new("L", (size, size))
        ImageDraw.Draw(canvas).polygon([tuple(c) for c in corners], fill=1)
        mask = np.asarray(canvas) > 0
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - ground).max() < 40:
            colour = 255 - colour
        field = fields[rng.integers(3)][mask] * rng.uniform(0, 80)
        image[mask] = colour + field[:, None]
        labels[mask] = k
    if rng.random() < 0.33:
        image[:] = image.mean(-1, keepdims=True)
    if rng.random() < 0.7:
        pixels = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(pixels.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6))), np.float32)
    low, high = rng.uniform(0, 80), rng.uniform(150, 255)
    image = low + image * (high - low) / 255
    image = image + rng.normal(0, rng.uniform(0, 16), image.shape[:2])[..., None]
    return np.clip(image, 0, 255).astype(np.uint8), labels


def instances(labels, min_area=MIN_VISIBLE):
    """Masks [n, H, W] bool of the labels large enough to be asked for."""
    areas = np.bincount(labels.ravel())
    return np.array([labels == k for k in range(1, len(areas)) if areas[k] >= min_area])
