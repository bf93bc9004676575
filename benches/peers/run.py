"""One case in PyTorch, in a process of its own: one line of JSON with the keys that `benches/cases.rs` prints.

    pip install -r benches/peers/requirements.txt
    python benches/peers/run.py --case global_layer_forward --implementation sdpa --reps 5

Implementations: Hugging Face's `eager` and `sdpa` (the N x N bias as a mask), and `sdpa_without_bias` (no relative
positions: a bound, not SAM). `compiled`, for the encoder, is `sdpa` by torch.compile. On the CPU also `openvino`, for the
encoder and the decoder in evaluation, and `onnxruntime` for the encoder; these two have `--quantize int8`. On CUDA also
`flex` (FlexAttention) and `triton` (a kernel of our own in the manner of the published ones). LoRA is PEFT's. `kept` is no
implementation but the environment: see `benches/report/run.py`.
"""

import argparse
import importlib
import json
import sys

# OpenVINO and NNCF do without it. It starts processes that take the CPUs from the measurement.
sys.modules["openvino_telemetry"] = None

import torch
import torch.nn.functional as F

import sam
from cores import CORES
from measure import measure, status

IMPLEMENTATIONS = ["eager", "sdpa", "compiled", "sdpa_without_bias", "openvino", "onnxruntime", "flex", "triton"]


def core_of(args, side):
    """The attention of CUDA alone, for a grid of `side`; none for those that Hugging Face has."""
    if args.implementation in ("flex", "triton"):
        if args.device.type != "cuda":
            raise SystemExit(f"{args.implementation}: needs --device cuda")
        import cuda_attention

        return cuda_attention.CORES[args.implementation](side)
    return None


def tokens(args, channels):
    shape = (args.batch, args.grid, args.grid, channels)
    return torch.randn(shape, device=args.device, dtype=args.torch_dtype)


def linear_forward(args):
    dim = sam.MODELS[args.model]["hidden_size"]
    x, linear = tokens(args, dim), torch.nn.Linear(dim, 3 * dim, device=args.device, dtype=args.torch_dtype)
    return lambda: F.linear(x, linear.weight, linear.bias)


def lin1_forward(args):
    dim = sam.MODELS[args.model]["hidden_size"]
    x, linear = tokens(args, dim), torch.nn.Linear(dim, 4 * dim, device=args.device, dtype=args.torch_dtype)
    return lambda: F.gelu(F.linear(x, linear.weight, linear.bias))


def attention(args):
    """The operation alone: from packed qkv, tables gathered, to the heads side by side."""
    model, grid = sam.MODELS[args.model], args.grid
    heads, dim = model["num_attention_heads"], model["hidden_size"]
    core = core_of(args, grid) or CORES[args.implementation]
    head_dim = dim // heads
    qkv = tokens(args, 3 * dim)
    table = torch.randn(2, 2 * grid - 1, head_dim, device=args.device, dtype=args.torch_dtype) * 0.02
    train = args.case == "attention_train"
    qkv.requires_grad_(train)
    index = torch.arange(grid)[:, None] - torch.arange(grid)[None, :] + grid - 1

    def forward():
        q, k, v = qkv.view(args.batch, grid * grid, 3, heads, head_dim).permute(2, 0, 3, 1, 4).flatten(1, 2)
        rows = q.view(-1, grid, grid, head_dim)
        rel_h = torch.einsum("bhwc,hkc->bhwk", rows, table[0][index]).flatten(1, 2)
        rel_w = torch.einsum("bhwc,wkc->bhwk", rows, table[1][index]).flatten(1, 2)
        out = core(q, k, v, rel_h, rel_w, head_dim**-0.5)
        return out.view(args.batch, heads, grid, grid, head_dim).permute(0, 2, 3, 1, 4).flatten(3)

    return backward_of(forward, [qkv]) if train else forward


def layer(args):
    train = args.case.endswith("train")
    windowed = args.case.startswith("windowed")
    module = sam.layer(args, windowed, core_of(args, sam.WINDOW if windowed else args.grid))
    x = tokens(args, sam.MODELS[args.model]["hidden_size"]).requires_grad_(train)
    if not train:
        return lambda: module(x)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return backward_of(lambda: module(x), [x, *trained])


def qkv(args):
    project, adapters = sam.qkv(args)
    train = args.case == "qkv_train"
    x = tokens(args, sam.MODELS[args.model]["hidden_size"]).requires_grad_(train)
    return backward_of(lambda: project(x), [x, *adapters]) if train else lambda: project(x)


def backward_of(forward, leaves):
    def run():
        for leaf in leaves:
            leaf.grad = None
        forward().square().mean().backward()

    return run


def pixels(args):
    side = 16 * args.grid
    return torch.randn(args.batch, 3, side, side, device=args.device, dtype=args.torch_dtype)


def encoder_forward(args):
    if args.implementation in ("openvino", "onnxruntime"):
        return importlib.import_module(f"{args.implementation}_encoder").forward(args, pixels(args))
    module, x = sam.encoder(args, core_of(args, args.grid)), pixels(args)
    return lambda: module(pixel_values=x)


def encoder_train_step(args):
    """Forward, backward, AdamW on the adapters: as ours."""
    module, x = sam.encoder(args, core_of(args, args.grid)), pixels(args)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    def run():
        out = module(pixel_values=x).last_hidden_state
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def decoder(args):
    forward, image = sam.decoder(args)
    if args.case in ("decoder_forward", "decoder_prompt"):
        return forward
    return backward_of(forward, [image.requires_grad_()])


def gemm_peak(args):
    """Plain GEMM into memory that is there: MKL or OpenBLAS, cuBLAS."""
    a = torch.randn(4096, 768, device=args.device, dtype=args.torch_dtype)
    b = torch.randn(768, 2304, device=args.device, dtype=args.torch_dtype)
    out = torch.empty(4096, 2304, device=args.device, dtype=args.torch_dtype)
    return lambda: torch.mm(a, b, out=out)


CASES = {
    "linear_forward": linear_forward,
    "lin1_forward": lin1_forward,
    "attention_forward": attention,
    "attention_train": attention,
    "global_layer_forward": layer,
    "windowed_layer_forward": layer,
    "global_layer_train": layer,
    "windowed_layer_train": layer,
    "qkv_forward": qkv,
    "qkv_train": qkv,
    "encoder_forward": encoder_forward,
    "encoder_train_step": encoder_train_step,
    "decoder_forward": decoder,
    "decoder_prompt": decoder,
    "decoder_train": decoder,
    "gemm_peak": gemm_peak,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--implementation", default="sdpa", choices=IMPLEMENTATIONS)
    parser.add_argument("--model", default="b", choices=sam.MODELS)
    parser.add_argument("--grid", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16", "f16"])
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--reps", type=int, default=3)
    args = parser.parse_args()
    args.torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[args.dtype]
    if args.quantize and args.implementation not in ("openvino", "onnxruntime"):
        raise SystemExit(f"{args.implementation}: has no --quantize")
    torch.manual_seed(0)
    before = status("VmRSS")
    run = CASES[args.case](args)
    with torch.set_grad_enabled("train" in args.case):
        measured = measure(args.device, args.reps, run)
    peak = status("VmHWM")
    measured["resident"] = None if before is None or peak is None else peak - before
    config = {key: getattr(args, key) for key in ("grid", "batch", "rank", "dropout", "dtype", "quantize")}
    config |= {"model": f"vit_{args.model}", "device": str(args.device), "threads": torch.get_num_threads()}
    print(json.dumps({"case": args.case, "implementation": args.implementation, "config": config, **measured}))


if __name__ == "__main__":
    main()
