"""SAM's encoder in OpenVINO: Hugging Face's module, converted by another process, whose memory is not measured.

With `--quantize int8` NNCF quantizes it after training, weights and activations, as its guide does for a transformer.
"""

import copy
import multiprocessing
import tempfile
from pathlib import Path

import openvino
import torch

import sam

# Images that NNCF takes the ranges of activations from. More change the ranges, not the speed.
CALIBRATION_IMAGES = 2


def convert(args, path):
    """Writes the eager module as OpenVINO's own format, in f32 or int8: other precisions are chosen where it is compiled."""
    args, quantize = copy.copy(args), args.quantize
    args.implementation, args.torch_dtype = "eager", torch.float32
    side = 16 * args.grid
    with torch.no_grad():
        example = {"pixel_values": torch.zeros(args.batch, 3, side, side)}
        model = openvino.convert_model(sam.encoder(args), example_input=example)
    if quantize:
        import nncf

        model.reshape([args.batch, 3, side, side])
        images = nncf.Dataset([torch.randn(args.batch, 3, side, side).numpy() for _ in range(CALIBRATION_IMAGES)])
        model = nncf.quantize(model, images, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_IMAGES)
    openvino.save_model(model, path, compress_to_fp16=False)


def forward(args, pixels):
    """A function that runs the encoder, with as many threads as PyTorch has and products in `args.dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.xml"
        process = multiprocessing.get_context("spawn").Process(target=convert, args=(args, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit("the encoder was not converted")
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": args.dtype,
            "ENABLE_MMAP": False,
        }
        request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    pixels = pixels.float().numpy()
    return lambda: request.infer([pixels])
