"""Pretrain the small base SAM of assets/tiny-sam/ on generated scenes (CPU, one thread, about half an hour).

    pip install torch==2.15.0 transformers==5.23.0 numpy pillow safetensors
    OMP_NUM_THREADS=1 python scripts/pretrain_tiny_sam.py [--out assets/tiny-sam] [--steps 4800]

A Hugging Face `SamModel` of 128x128 images in 8x8 patches: a 16x16 grid, 4 layers of width 128 with 4 heads. The window
is 7, so that a window layer pads 16 to 21; layers 1 and 3 have global attention. Prompt encoder and mask decoder have
width 64, masks 64x64. Each step takes 8 scenes and 6 instances of each, prompted by points or by a jittered box. At 64x64
it minimises

    4 BCE + dice + MSE(predicted IoU, IoU)

against the area-averaged mask. It takes the single-mask output, or the best of the three multimask outputs (all three for
the IoU term), as SAM's paper does. Written: config.json, model.safetensors (fused qkv, f32), preprocessor_config.json, training_log.csv.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from synthetic_scenes import instances, scene

SIZE, PATCH, WIDTH = 128, 8, 64  # image side, patch side, width of prompt encoder and mask decoder
# Mean and deviation of SAM's processor, for pixels in 0..1.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def build_model() -> SamModel:
    """The model with weights worth training: HF's own (initializer_range 1e-10, zero tables) are all but zero."""
    vision = SamVisionConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=PATCH,
        window_size=7, global_attn_indexes=[1, 3], output_channels=WIDTH, num_pos_feats=WIDTH // 2,
    )
    prompt = SamPromptEncoderConfig(hidden_size=WIDTH, image_size=SIZE, patch_size=PATCH)
    decoder = SamMaskDecoderConfig(hidden_size=WIDTH, mlp_dim=256, num_attention_heads=4, iou_head_hidden_dim=WIDTH)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    for module in model.modules():  # the original SAM's choice: PyTorch's defaults, embeddings N(0, 1)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            module.reset_parameters()
    for name, parameter in model.vision_encoder.named_parameters():
        if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=0.05)
    # The random Fourier features of the coordinates; frozen, as in SAM, whose published ones have unit spread.
    nn.init.normal_(model.shared_image_embedding.positional_embedding).requires_grad_(False)
    return model


def to_pixels(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> normalised f32 [3, H, W]."""
    scaled = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def random_point(rng, mask):
    """(x, y) of a random pixel of `mask`."""
    y, x = np.nonzero(mask)
    i = rng.integers(len(x))
    return x[i], y[i]


def box_of(mask):
    """(x0, y0, x1, y1): the outermost pixels of `mask`."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max(), y.max()], np.float32)


def make_batch(rng, images, prompts):
    """Scenes, `prompts` instances each -> (pixel_values, prompt arguments, masks [B, P, S, S], multimask_output)."""
    pixels, masks = [], []
    while len(pixels) < images:
        image, labels = scene(rng, SIZE)
        found = instances(labels)
        if len(found):
            pixels.append(to_pixels(image))
            masks.append(found[rng.permutation(np.resize(rng.permutation(len(found)), prompts))])
    if rng.random() < 0.6:
        count = int(rng.choice([1, 1, 1, 2, 3]))
        points = np.zeros((images, prompts, count, 2), np.float32)
        kinds = np.ones((images, prompts, count), np.int64)
        for i in range(images):
            for j in range(prompts):
                for n in range(count):
                    outside = n > 0 and rng.random() < 0.4
                    kinds[i, j, n] = 0 if outside else 1
                    points[i, j, n] = random_point(rng, ~masks[i][j] if outside else masks[i][j])
        prompt = {"input_points": torch.from_numpy(points), "input_labels": torch.from_numpy(kinds)}
        multimask = rng.random() < (0.5 if count == 1 else 0.2)
    else:
        boxes = np.array([[box_of(m) for m in found] for found in masks])
        spread = 0.08 * np.stack([boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]] * 2, -1)
        boxes += np.clip(rng.normal(0, 1, boxes.shape) * spread, -6, 6)
        prompt = {"input_boxes": torch.from_numpy(np.clip(boxes, 0, SIZE - 1).astype(np.float32))}
        multimask = rng.random() < 0.2
    return torch.stack(pixels), prompt, torch.from_numpy(np.array(masks)), bool(multimask)


def loss_of(output, masks):
    """The three terms (bce, dice, iou) of the better output per prompt; logits [B, P, M, h, h], masks [B, P, S, S]."""
    logits = output.pred_masks
    target = F.avg_pool2d(masks.float(), SIZE // logits.shape[-1])[:, :, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-2, -1))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    with torch.no_grad():
        best = (4 * bce + dice).argmin(-1, keepdim=True)
        a, b = logits > 0, target > 0.5
        iou = (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp(min=1)
    return bce.gather(-1, best).mean(), dice.gather(-1, best).mean(), F.mse_loss(output.iou_scores, iou)


def mask_iou(logits, masks):
    """IoU at full size of each mask: logits [P, h, h] (bilinear to [S, S], > 0) and masks [P, S, S] bool."""
    full = F.interpolate(logits[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0] > 0
    return (full & masks).sum((-2, -1)) / (full | masks).sum((-2, -1))


@torch.no_grad()
def evaluate(model, scenes, seed):
    """Mean IoU over all instances of `scenes` for one random point and for the exact box, single mask. For the point,
    also that of the mask that the model itself scores best of three, and the mean error of that score."""
    rng = np.random.default_rng(seed)
    got = {"point": [], "box": [], "point_best_of_3": [], "iou_score_error": []}
    for image, masks in scenes:
        embedding = model.get_image_embeddings(to_pixels(image)[None])
        truth = torch.from_numpy(masks)
        points = torch.tensor(np.array([[random_point(rng, m)] for m in masks]), dtype=torch.float32)[None]
        boxes = torch.tensor(np.array([box_of(m) for m in masks]))[None]
        for kind, prompt in (("point", {"input_points": points}), ("box", {"input_boxes": boxes})):
            out = model(image_embeddings=embedding, multimask_output=False, **prompt)
            got[kind].append(mask_iou(out.pred_masks[0, :, 0], truth))
        out = model(image_embeddings=embedding, multimask_output=True, input_points=points)
        score, best = out.iou_scores[0].max(-1)
        iou = mask_iou(out.pred_masks[0, torch.arange(len(best)), best], truth)
        got["point_best_of_3"].append(iou)
        got["iou_score_error"].append((score - iou).abs())
    return {k: round(torch.cat(v).mean().item(), 4) for k, v in got.items()}


def heldout_scenes(count=200, seed=10_007):
    """Scenes that training, with another seed, does not draw."""
    rng = np.random.default_rng(seed)
    drawn = ((image, instances(labels)) for image, labels in (scene(rng, SIZE) for _ in range(count)))
    return [(image, masks) for image, masks in drawn if len(masks)]


def save(model, out: Path):
    """Hugging Face layout, and the processor's settings for 128-pixel images."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor = {
        "image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor",
        "do_resize": True, "size": {"longest_edge": SIZE}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
        "do_pad": True, "pad_size": {"height": SIZE, "width": SIZE},
        "mask_size": {"longest_edge": SIZE // 2}, "mask_pad_size": {"height": SIZE // 2, "width": SIZE // 2},
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets" / "tiny-sam")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--images", type=int, default=8, help="scenes a step")
    parser.add_argument("--prompts", type=int, default=6, help="instances of each scene")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; linear warm-up of 200 steps, then cosine to 0")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    model = build_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": args.weight_decay},
         {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / 200, 1.0) * 0.5 * (1 + np.cos(np.pi * min(t / args.steps, 1.0))),
    )
    scenes = heldout_scenes()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, "
          f"{len(scenes)} held-out scenes with {sum(len(m) for _, m in scenes)} instances", flush=True)

    fields = ["step", "seconds", "bce", "dice", "iou_mse", "point", "box", "point_best_of_3", "iou_score_error"]
    start, sums = time.time(), []
    with open(args.out / "training_log.csv", "w", newline="") as file:
        log = csv.DictWriter(file, fields)
        log.writeheader()
        for step in range(1, args.steps + 1):
            pixels, prompt, masks, multimask = make_batch(rng, args.images, args.prompts)
            terms = loss_of(model(pixel_values=pixels, multimask_output=multimask, **prompt), masks)
            optimizer.zero_grad()
            (4 * terms[0] + terms[1] + terms[2]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            sums.append([t.item() for t in terms])
            if step % 400 == 0 or step == args.steps:
                # In between, 50 scenes will do; the last row of the log is over all of them.
                quick = scenes if step == args.steps else scenes[:50]
                row = dict(zip(fields, [step, round(time.time() - start), *np.round(np.mean(sums, 0), 4).tolist()]))
                row.update(evaluate(model, quick, seed=1))
                log.writerow(row)
                file.flush()
                print(row, flush=True)
                save(model, args.out)
                sums = []


if __name__ == "__main__":
    main()
