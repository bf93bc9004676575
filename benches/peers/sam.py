"""SAM's encoder and its layers as Hugging Face has them, with random weights and PEFT's LoRA on q and v.

An attention is stock (fused qkv) where nothing is adapted. Where PEFT is to adapt two of q, k and v, it is split into
three Linears, as one would do today.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.sam import modeling_sam
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamVisionConfig

MODELS = {
    "b": dict(hidden_size=768, num_attention_heads=12, num_hidden_layers=12, global_attn_indexes=[2, 5, 8, 11]),
    "l": dict(hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, global_attn_indexes=[5, 11, 17, 23]),
    "h": dict(hidden_size=1280, num_attention_heads=16, num_hidden_layers=32, global_attn_indexes=[7, 15, 23, 31]),
}
WINDOW = 14


class SdpaWithoutBias(modeling_sam.SamVisionSdpaAttention):
    """No relative positions at all: not SAM any more, but the bound of what SDPA could do."""

    def __init__(self, config, window_size):
        super().__init__(config, window_size)
        self.use_rel_pos = False


class Adapted(nn.Module):
    """Any of the attentions with another core: `core(q, k, v, rel_h, rel_w) -> out`, all `[B heads, N, ..]`."""

    def __init__(self, attention, core):
        super().__init__()
        self.inner, self.core = attention, core

    def forward(self, hidden_states, output_attentions=False):
        inner = self.inner
        batch, height, width, _ = hidden_states.shape
        heads = inner.num_attention_heads
        qkv = inner.qkv(hidden_states).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * heads, height * width, -1).unbind(0)
        grid = q.reshape(batch * heads, height, width, -1)
        rel_h = torch.einsum("bhwc,hkc->bhwk", grid, inner.get_rel_pos(height, height, inner.rel_pos_h))
        rel_w = torch.einsum("bhwc,wkc->bhwk", grid, inner.get_rel_pos(width, width, inner.rel_pos_w))
        out = self.core(q, k, v, rel_h.flatten(1, 2), rel_w.flatten(1, 2), inner.scale)
        out = out.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4).reshape(batch, height, width, -1)
        return inner.proj(out), None


def config_of(model, grid, implementation):
    config = SamVisionConfig(image_size=16 * grid, window_size=WINDOW, **MODELS[model])
    config._attn_implementation = "eager" if implementation == "eager" else "sdpa"
    return config


def attention_class(implementation):
    if implementation == "eager":
        return modeling_sam.SamVisionAttention
    if implementation == "sdpa_without_bias":
        return SdpaWithoutBias
    return modeling_sam.SamVisionSdpaAttention


def randomize(module):
    """Normal weights, 0.02 wide; those of norms around one; nothing trainable."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02)


def split_qkv(attention):
    """Replaces `qkv` by Linears `q`, `k`, `v`, its row blocks; the callers' `qkv(x)` still works."""
    fused = attention.qkv
    del attention.qkv
    for name, weight, bias in zip("qkv", fused.weight.chunk(3), fused.bias.chunk(3)):
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
        linear.load_state_dict({"weight": weight, "bias": bias})
        setattr(attention, name, linear.requires_grad_(False))
    # Looked up at each call, so that PEFT's wrapped q and v are found.
    attention.__dict__["qkv"] = lambda x: torch.cat([attention.q(x), attention.k(x), attention.v(x)], -1)


def adapt(module, rank, dropout):
    """PEFT's LoRA on q and v, B random too: zeros would spare every gradient of A."""
    for part in list(module.modules()):
        if isinstance(part, modeling_sam.SamVisionAttention):
            split_qkv(part)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["q", "v"])
    model = get_peft_model(module, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.02)
    return model


class Layer(nn.Module):
    """The part between a layer's norm and its residual: partition, attention, unpartition."""

    # Without state of their own.
    window_partition = modeling_sam.SamVisionLayer.window_partition
    window_unpartition = modeling_sam.SamVisionLayer.window_unpartition

    def __init__(self, attention, window_size):
        super().__init__()
        self.attn, self.window_size = attention, window_size

    def forward(self, x):
        if self.window_size == 0:
            return self.attn(x)[0]
        windows, padded = self.window_partition(x, self.window_size)
        return self.window_unpartition(self.attn(windows)[0], self.window_size, padded, x.shape[1:3])


def layer(args, windowed, core=None):
    """The attention layer, qkv to proj, adapted in the training cases."""
    config = config_of(args.model, args.grid, args.implementation)
    window = WINDOW if windowed else 0
    attention = attention_class(args.implementation)(config, window)
    randomize(attention)
    module = Layer(Adapted(attention, core) if core else attention, window).to(args.device, args.torch_dtype)
    if args.case.endswith("train"):
        return adapt(module, args.rank, args.dropout).train()
    return module.eval()


def qkv(args):
    """The projections q, k and v with PEFT's LoRA on q and v, in training; and the adapters' parameters."""
    attention = modeling_sam.SamVisionAttention(config_of(args.model, args.grid, "eager"), 0)
    randomize(attention)
    module = adapt(Layer(attention, 0).to(args.device, args.torch_dtype), args.rank, args.dropout).train()
    adapters = [p for name, p in module.named_parameters() if ".q.lora" in name or ".v.lora" in name]
    return lambda x: attention.qkv(x), adapters


def encoder(args, core=None):
    config = config_of(args.model, args.grid, args.implementation)
    module = modeling_sam.SamVisionEncoder(config)
    if args.implementation == "sdpa_without_bias":
        for part in module.layers:
            part.attn.use_rel_pos = False
    randomize(module)
    if core:
        for part in module.layers:
            # One core for both kinds would compile twice; windows stay with SDPA, as the published kernels do.
            if part.window_size == 0:
                part.attn = Adapted(part.attn, core)
    module = module.to(args.device, args.torch_dtype)
    module = adapt(module, args.rank, args.dropout).train() if args.case.endswith("train_step") else module.eval()
    return torch.compile(module, dynamic=False) if args.implementation == "compiled" else module


def decoder(args):
    """The mask decoder on a stored embedding: `batch` prompts of one point, two tokens each, three masks."""
    config = SamMaskDecoderConfig()
    config._attn_implementation = "sdpa" if args.implementation == "openvino" else args.implementation
    module = modeling_sam.SamMaskDecoder(config)
    randomize(module)
    module = module.to(args.device, args.torch_dtype).eval()
    random = lambda *shape: torch.randn(shape, device=args.device, dtype=args.torch_dtype)
    image = random(1, 256, args.grid, args.grid)
    sparse, positions = random(1, args.batch, 2, 256), random(1, 256, args.grid, args.grid)
    dense = random(1, 256, 1, 1).expand(1, 256, args.grid, args.grid)
    inputs = {
        "image_embeddings": image,
        "image_positional_embeddings": positions,
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }
    if args.implementation == "openvino":
        return openvino_of(Masks(module), list(inputs.values()), args), image
    return lambda: module(**inputs, multimask_output=True)[0], image


class Masks(nn.Module):
    """The decoder as a function of tensors alone."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, image, positions, sparse, dense):
        return self.decoder(
            image_embeddings=image,
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )


def openvino_of(module, inputs, args):
    """The module by OpenVINO's CPU device, as many threads as PyTorch has, precision as asked for."""
    import openvino

    with torch.no_grad():
        model = openvino.convert_model(module.float(), example_input=tuple(x.float() for x in inputs))
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": args.dtype,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(model, "CPU", config).create_infer_request()
    arrays = [x.float().contiguous().numpy() for x in inputs]
    return lambda: request.infer(arrays)
