"""The plain recipe of the command `finetune` in PyTorch and PEFT, as the yardstick for the one in Rust.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 numpy pillow
    python scripts/finetune_peft.py --prompt point

It is the twin of `finetune --train adapters --corrections 0 --loss bce=4,dice=1 --batch 1 --prompts 12 --steps 250`.

LoRA (r 16, alpha 32, dropout 0.1) on q and v of the vision encoder; prompt encoder and mask decoder stay frozen. A step
takes one tile, turned or mirrored, and up to 12 of its instances. The loss is 4 BCE + dice of the single-mask output, as
in pretraining. AdamW's learning rate goes to 0 along a cosine. Prints the IoU over instances before, during and
after, on the training and on the held-out tiles.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import SamModel

from pretrain_tiny_sam import SIZE, box_of, loss_of, mask_iou, random_point, to_pixels

ASSETS = Path(__file__).parent.parent / "assets"


def split_qkv(model: SamModel):
    """Replace each encoder attention's fused `qkv` by Linears `q`, `k`, `v`, its row blocks."""
    for layer in model.vision_encoder.layers:
        attn = layer.attn
        fused = attn.qkv
        del attn.qkv
        for name, weight, bias in zip("qkv", fused.weight.chunk(3), fused.bias.chunk(3)):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": bias})
            setattr(attn, name, linear)
        # Looked up at each call, so that PEFT's wrapped q and v are found.
        attn.__dict__["qkv"] = lambda x, attn=attn: torch.cat([attn.q(x), attn.k(x), attn.v(x)], -1)


def load_tiles(folder: Path):
    """[(pixel_values [3, S, S], masks [n, S, S] bool)], longest side resized to S, padded with zeros as SAM does."""
    tiles = []
    for path in sorted((folder / "images").glob("*.png")):
        image, labels = Image.open(path).convert("RGB"), Image.open(folder / "masks" / path.name)
        scale = SIZE / max(image.size)
        size = [round(s * scale) for s in image.size]
        pixels = torch.zeros(3, SIZE, SIZE)
        pixels[:, : size[1], : size[0]] = to_pixels(np.array(image.resize(size, Image.BILINEAR)))
        full = np.zeros((SIZE, SIZE), np.uint8)
        full[: size[1], : size[0]] = np.array(labels.resize(size, Image.NEAREST))
        tiles.append((pixels, np.array([full == k for k in range(1, full.max() + 1)])))
    return tiles


def turned(rng, pixels, masks):
    """The tile in one of its eight orientations: a dozen tiles are few."""
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    pixels, masks = torch.rot90(pixels, turns, (1, 2)), np.rot90(masks, turns, (1, 2))
    return (pixels.flip(2), masks[:, :, ::-1].copy()) if flip else (pixels, masks.copy())


def prompt_for(kind, rng, masks):
    """One random point inside, or the exact box, per mask."""
    if kind == "box":
        return {"input_boxes": torch.tensor(np.array([box_of(m) for m in masks]))[None]}
    return {"input_points": torch.tensor(np.array([[random_point(rng, m)] for m in masks]), dtype=torch.float32)[None]}


@torch.no_grad()
def evaluate(model, tiles, kind):
    """Mean and median IoU over all instances (five points each, or the box); the prompts are the same at every call."""
    model.eval()
    rng = np.random.default_rng(1)
    iou = []
    for pixels, masks in tiles * (5 if kind == "point" else 1):
        out = model(pixel_values=pixels[None], multimask_output=False, **prompt_for(kind, rng, masks))
        iou.append(mask_iou(out.pred_masks[0, :, 0], torch.from_numpy(masks)))
    iou = torch.cat(iou)
    return f"mean {iou.mean():.4f} median {iou.median():.4f} (n={len(iou)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-sam")
    parser.add_argument("--data", type=Path, default=ASSETS / "photos" / "nuclei")
    parser.add_argument("--prompt", choices=["point", "box"], default="point")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--instances", type=int, default=12, help="at most so many instances a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = SamModel.from_pretrained(args.model, dtype=torch.float32)
    split_qkv(model)
    train, heldout = load_tiles(args.data / "train"), load_tiles(args.data / "heldout")
    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules=r".*vision_encoder.*\.(q|v)"),
    )
    model.print_trainable_parameters()
    for name, tiles in (("train", train), ("heldout", heldout)):
        print(f"before  {name:8} {evaluate(model, tiles, args.prompt)}", flush=True)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    start, recent = time.time(), []
    for step in range(1, args.steps + 1):
        model.train()
        pixels, masks = turned(rng, *train[rng.integers(len(train))])
        masks = masks[rng.permutation(len(masks))[: args.instances]]
        out = model(pixel_values=pixels[None], multimask_output=False, **prompt_for(args.prompt, rng, masks))
        bce, dice, _ = loss_of(out, torch.from_numpy(masks)[None])
        loss = 4 * bce + dice
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0 or step == args.steps:
            pace = f"loss {np.mean(recent):.4f} {(time.time() - start) / step:.3f} s/step"
            print(f"step {step} {pace} heldout {evaluate(model, heldout, args.prompt)}", flush=True)
            recent = []
    print(f"after   {'train':8} {evaluate(model, train, args.prompt)}")


if __name__ == "__main__":
    main()
