"""Writes processor.safetensors: what transformers' SamImageProcessorPil makes of small generated images.

Made with transformers 5.23.0, torch 2.15.0, Pillow 13.0.0:  python processor.py
"""
import os

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.processing_sam import SamProcessor

SIDE = 64
rng = np.random.default_rng(0)
image_processor = SamImageProcessorPil(
    size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}
)
processor = SamProcessor(image_processor)
out = {}
for name, (height, width) in {"wide": (90, 150), "tall": (77, 30), "same": (40, 64), "odd": (31, 33)}.items():
    # Smooth structure plus noise, so that both the filter and its rounding show.
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / (5 + c)) * np.cos(y / (7 - c)) for c in range(3)], -1)
    image = np.clip(128 + 90 * waves + rng.normal(0, 30, waves.shape), 0, 255).astype(np.uint8)
    points = [[[[3.0, 5.0], [width - 1.0, height - 1.0]]]]
    boxes = [[[1.0, 2.0, width / 2, height / 3]]]
    inputs = processor(Image.fromarray(image), input_points=points, input_boxes=boxes, return_tensors="pt")
    masks = torch.from_numpy(rng.normal(0, 3, (1, 2, 16, 16)).astype(np.float32))
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    logits = image_processor.post_process_masks([masks[0][None]], *sizes, binarize=False)[0]
    out |= {
        f"{name}/image": torch.from_numpy(image),
        f"{name}/pixel_values": inputs["pixel_values"].float(),
        f"{name}/reshaped_input_sizes": torch.as_tensor(np.array(sizes[1])),
        f"{name}/points": torch.tensor(points),
        f"{name}/input_points": inputs["input_points"].float(),
        f"{name}/boxes": torch.tensor(boxes),
        f"{name}/input_boxes": inputs["input_boxes"].float(),
        f"{name}/low_res_masks": masks,
        f"{name}/mask_logits": logits.float(),
    }
save_file({k: v.contiguous() for k, v in out.items()}, os.path.join(os.path.dirname(__file__) or ".", "processor.safetensors"))
