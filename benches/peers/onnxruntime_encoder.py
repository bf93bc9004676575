"""SAM's encoder in ONNX Runtime: Hugging Face's module, exported by another process, whose memory is not measured.

With `--quantize int8` it is quantized dynamically, weights by channel, as ONNX Runtime's guide does for a transformer.
"""

import copy
import multiprocessing
import tempfile
from pathlib import Path

import onnxruntime
import torch

import sam


class Embedding(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values):
        return self.encoder(pixel_values=pixel_values).last_hidden_state


def convert(args, path):
    """Writes the module as ONNX, in f32 or with linear layers in int8."""
    args, quantize = copy.copy(args), args.quantize
    args.implementation, args.torch_dtype = "eager", torch.float32
    side = 16 * args.grid
    plain = path.with_name("plain.onnx") if quantize else path
    with torch.no_grad():
        example = (torch.zeros(args.batch, 3, side, side),)
        torch.onnx.export(Embedding(sam.encoder(args)).eval(), example, plain, input_names=["pixel_values"], dynamo=True)
    if quantize:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(plain, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)


def forward(args, pixels):
    """A function that runs the encoder, with as many threads as PyTorch has."""
    if args.dtype != "f32":
        raise SystemExit("onnxruntime: its CPU kernels are for f32 and int8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        process = multiprocessing.get_context("spawn").Process(target=convert, args=(args, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit("the encoder was not exported")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pixels = pixels.float().numpy()
    return lambda: session.run(None, {"pixel_values": pixels})
