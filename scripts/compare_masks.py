"""How much the masks of two runs of `masks` agree: `python scripts/compare_masks.py A/masks.json B/masks.json`.

Each mask of A is compared with the mask of B that it overlaps most. Prints the number of masks of both runs and the mean of
these IoUs. Two shares of A's masks follow: those above an IoU of 0.5, and of 0.9.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from pycocotools import mask as coco


def masks_of(path):
    """Run lengths by the names of the images."""
    data = json.loads(Path(path).read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    masks = defaultdict(list)
    for annotation in data["annotations"]:
        lengths = annotation["segmentation"]
        if isinstance(lengths["counts"], list):
            lengths = coco.frPyObjects(lengths, *lengths["size"])
        masks[names[annotation["image_id"]]].append(lengths)
    return masks


def main():
    first, second = (masks_of(path) for path in sys.argv[1:3])
    best = []
    for name, masks in first.items():
        others = second.get(name, [])
        overlaps = coco.iou(masks, others, [0] * len(others)) if others else [[0.0]] * len(masks)
        best += [max(row) for row in overlaps]
    if not best:
        sys.exit(f"{sys.argv[1]}: no masks")
    count = lambda masks: sum(map(len, masks.values()))
    above = lambda limit: sum(iou > limit for iou in best) / len(best)
    print(f"{count(first)} and {count(second)} masks; mean IoU {sum(best) / len(best):.4f};", end=" ")
    print(f"{above(0.5):.3f} above 0.5, {above(0.9):.3f} above 0.9")


if __name__ == "__main__":
    main()
