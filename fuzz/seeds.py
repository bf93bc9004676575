#!/usr/bin/env python3
"""Writes seeds/<target>/: valid files from which the fuzzers of files start. Python's own library and Pillow."""

import io
import json
import struct
from pathlib import Path

from PIL import Image

SEEDS = Path(__file__).parent / "seeds"
WEIGHTS = {
    "layers.0.attn.q.weight": [2, 4],
    "layers.0.attn.q.bias": [2],
    "neck.layer_norm1.weight": [3],
    "neck.layer_norm1.bias": [3],
}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}


def tensors(shapes, dtype="F32"):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES[dtype]
        for side in shape:
            end += (end - start) * (side - 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write(target, name, content):
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


for dtype in BYTES:
    write("tensors", dtype, tensors(WEIGHTS, dtype))
fused = {"image_encoder.patch_embed.proj.weight": [1], "image_encoder.blocks.0.attn.qkv.weight": [6, 4]}
write("tensors", "original", tensors(fused))

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "lora_dropout": 0.1}
VARIANTS = {
    "plain": ({}, {}),
    "regex": ({"target_modules": r".*\.(q|k)", "rank_pattern": {"q": 1}, "alpha_pattern": {"attn.q": 2}}, {}),
    "dora": ({"use_dora": True}, {"lora_magnitude_vector": [2]}),
    "bias": ({"lora_bias": True, "use_rslora": True}, {"lora_B.bias": [2]}),
    "saved": ({"modules_to_save": ["layer_norm1"], "exclude_modules": "neck.*"}, {}),
}
for name, (changes, extra) in VARIANTS.items():
    rank = 1 if "rank_pattern" in changes else 2
    shapes = {"lora_A.weight": [rank, 4], "lora_B.weight": [2, rank], **extra}
    shapes = {f"base_model.model.layers.0.attn.q.{key}": shape for key, shape in shapes.items()}
    if name == "saved":
        shapes |= {f"base_model.model.neck.layer_norm1.{key}": [3] for key in ("weight", "bias")}
    config = json.dumps(LORA | changes)
    write("config", f"lora-{name}", config)
    write("adapter", name, config.encode() + b"\0" + tensors(shapes))

vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": [8, 8]}
write("config", "sam", json.dumps({"model_type": "sam", "vision_config": vision}))
write("config", "processor", json.dumps({"size": {"longest_edge": 64}, "image_mean": [0.5] * 3, "do_pad": True}))

for mode, format in [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("L", "TIFF"), ("RGB", "TIFF"),
                     ("RGB", "BMP"), ("P", "GIF"), ("RGB", "WEBP"), ("L", "PPM"), ("RGB", "JPEG"), ("RGBA", "PNG")]:
    image, buffer = Image.new(mode, (7, 5)), io.BytesIO()
    image.putpixel((3, 2), (200,) * len(image.getbands()) if len(image.getbands()) > 1 else 200)
    image.save(buffer, format)
    write("image", f"{mode.replace(';', '')}.{format.lower()}", buffer.getvalue())

OBJECTS = {
    "polygons": [[0.5, 0.5, 5, 0.5, 5.2, 3, 1, 3.5], [2, 2, 4, 2, 4, 4]],
    "runs": {"size": [4, 6], "counts": [3, 5, 1, 6, 9]},
    "compressed": {"size": [4, 6], "counts": "35118"},
}
for name, segmentation in OBJECTS.items():
    images = [{"id": 1, "file_name": "a.png", "width": 6, "height": 4}]
    annotation = {"id": 2, "image_id": 1, "segmentation": segmentation, "iscrowd": 0}
    write("coco", name, json.dumps({"images": images, "annotations": [annotation]}))
