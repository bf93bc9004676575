"""Cut the photographs in assets/photos/ from two PyPI wheels.

    pip download --no-deps stardist==0.9.2 scikit-image==0.26.0     # the wheels
    pip install numpy pillow scikit-image==0.26.0                   # what this script imports
    python scripts/make_photos.py --wheels DIR [--out assets/photos]

Two sets, each <set>/{train,heldout}/{images,masks}/<stem>.png, image 8-bit gray, mask an 8-bit label map
(0 background, k = instance k, 1..n without gaps, in reading order of first pixel):

* nuclei: the 512x512 fluorescence micrograph of the stardist wheel, annotated by hand; 8x8 tiles of 64x64, the
  bottom two rows held out.
* coins: the 303x384 photograph of the scikit-image wheel; its documented sobel + watershed recipe stands in for an
  annotation; 2x3 tiles of 151x128, the right column held out.

Tiles never overlap, so no held-out pixel is seen in training. Every fact is in assets/photos/SOURCES.md.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

# A remnant of an instance at a tile border is background when smaller than this: no one could tell what it is.
MIN_NUCLEUS_AREA = 40
MIN_COIN_AREA = 400


def read(wheels: Path, package: str, member: str) -> np.ndarray:
    """The image `member` out of the one wheel of `package` in the folder `wheels`."""
    found = sorted(wheels.glob(f"{package}-*.whl"))
    if len(found) != 1:
        raise SystemExit(f"{wheels}: expected one {package}-*.whl, found {len(found)}")
    with zipfile.ZipFile(found[0]) as wheel:
        return np.array(Image.open(io.BytesIO(wheel.read(member))))


def normalise(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map the two percentiles of the whole image to 0 and 255, so that all its tiles share one scale."""
    a, b = np.percentile(image, [low, high])
    return np.round(np.clip((image - a) / (b - a), 0, 1) * 255).astype(np.uint8)


def relabel(labels: np.ndarray, min_area: int) -> np.ndarray:
    """Keep each instance's largest connected part, drop those below `min_area` pixels, number the others 1..n."""
    out = np.zeros(labels.shape, np.uint8)
    values, first = np.unique(labels, return_index=True)
    k = 0
    for value in values[np.argsort(first)]:
        parts, _ = ndimage.label(labels == value)
        mask = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
        if value != 0 and mask.sum() >= min_area:
            k += 1
            out[mask] = k
    return out


def coin_labels(coins: np.ndarray) -> np.ndarray:
    """Region-based segmentation as in scikit-image's gallery (`plot_coins_segmentation`): markers at both ends of
    the histogram, watershed on the sobel elevation map, holes filled, components labelled."""
    from skimage.filters import sobel
    from skimage.segmentation import watershed

    markers = np.zeros(coins.shape, np.int32)
    markers[coins < 30] = 1
    markers[coins > 150] = 2
    segmented = watershed(sobel(coins), markers)
    return ndimage.label(ndimage.binary_fill_holes(segmented - 1))[0]


def tiles(image, labels, height, width, heldout, min_area, folder: Path):
    """Write the tiles of one image; `heldout(row, column)` says which part a tile belongs to."""
    found = {"train": [], "heldout": []}
    for row in range(image.shape[0] // height):
        for column in range(image.shape[1] // width):
            part = "heldout" if heldout(row, column) else "train"
            at = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
            mask = relabel(labels[at], min_area)
            for kind, pixels in (("images", image[at]), ("masks", mask)):
                path = folder / part / kind / f"{folder.name}_r{row}c{column}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, optimize=True)
            found[part].append(np.bincount(mask.ravel())[1:])
    for part, areas in found.items():
        every = np.concatenate(areas)
        sizes = f"{len(every)} instances of {every.min()}..{every.max()} pixels"
        print(f"{folder.name} {part}: {len(areas)} tiles, {sizes}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the two wheels")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets" / "photos")
    args = parser.parse_args()

    image = read(args.wheels, "stardist", "stardist/data/images/img2d.tif")
    labels = read(args.wheels, "stardist", "stardist/data/images/mask2d.tif")
    # The 99th percentile: a few dividing nuclei outshine the rest and would leave it nearly black.
    tiles(normalise(image, 1, 99), labels, 64, 64, lambda r, c: r >= 6, MIN_NUCLEUS_AREA, args.out / "nuclei")

    coins = read(args.wheels, "scikit_image", "skimage/data/coins.png")
    # Grey levels as they are: the recipe's thresholds refer to them.
    tiles(coins, coin_labels(coins), 151, 128, lambda r, c: c == 2, MIN_COIN_AREA, args.out / "coins")


if __name__ == "__main__":
    main()
