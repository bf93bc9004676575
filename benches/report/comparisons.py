"""Comparisons: the case, the peer, and the ratio asked for.

On the CPU, a bar on time is against the fastest of the peers at their best: with the allocator told to keep freed pages. A bar on
memory is against one named peer with the default allocator, the state everybody's machine is in.

There are two measurements of candle: as published, in a program that does not have this crate, and beside this crate. Its
AVX-512 feature of `gemm` reaches candle's own products. The bars are for the first, what a user has without this crate.
The second, faster by this crate's doing, is shown with its ratio.
"""

from dataclasses import dataclass, field

DEFAULT, KEPT = "default", "kept"
# Names of candle in the rows.
PUBLISHED, SPED_UP = "candle as published,", "candle with this crate's AVX-512,"


@dataclass(frozen=True)
class Config:
    """One implementation under one allocator. The values of `program`:

    - `candle`: cases.rs; `beside`: cases.rs with candle's own operations as a peer;
    - `published`: peers/candle; `avx512`: the same with the feature of that name;
    - `pytorch`: peers/run.py.
    """

    program: str
    implementation: str
    allocator: str = DEFAULT
    options: tuple = ()

    @property
    def name(self):
        options = "".join(f" {key}={value}" for key, value in self.options)
        program = {"published": PUBLISHED, "beside": SPED_UP, "avx512": SPED_UP}.get(self.program, self.program)
        return f"{program} {self.implementation}{options} ({self.allocator})"


@dataclass
class Comparison:
    case: str
    options: dict = field(default_factory=dict)
    # Other Configs than ours; the report adds ours under both allocators.
    peers: list = field(default_factory=list)
    # peer / ours, at least.
    time_bar: float | None = None
    memory_bar: tuple | None = None  # (ratio, Config of the peer)
    # As memory_bar, of all that is resident, weights included.
    resident_bar: tuple | None = None
    # Runs after the first in a process, and processes: --quick, else.
    reps: tuple = (3, 5)
    rounds: tuple = (1, 3)
    # Peers too slow for --quick.
    slow: tuple = ()

    @property
    def name(self):
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return self.case + options


def both(program, implementation):
    return [Config(program, implementation, DEFAULT), Config(program, implementation, KEPT)]


EAGER, SDPA = both("pytorch", "eager"), both("pytorch", "sdpa")
COMPILED = Config("pytorch", "compiled", KEPT)
COMPOSED, CANDLE_SAM = both("beside", "composed"), both("avx512", "candle-transformers")
PUBLISHED_COMPOSED, PUBLISHED_SAM = both("published", "composed"), both("published", "candle-transformers")
# The fastest way to run the encoder on a CPU that users are told of.
OPENVINO = Config("pytorch", "openvino", KEPT)
ONNXRUNTIME = Config("pytorch", "onnxruntime", KEPT)
# Not SAM: what SDPA would take if there were no relative positions. Never the peer of a bar.
BOUND = Config("pytorch", "sdpa_without_bias", KEPT)

BARS = [
    Comparison("linear_forward", peers=[*COMPOSED, *EAGER], reps=(10, 20)),
    Comparison(
        "global_layer_forward",
        peers=[*EAGER, *SDPA, BOUND, *PUBLISHED_COMPOSED, *COMPOSED],
        time_bar=2.2,
        memory_bar=(8.0, SDPA[0]),
        reps=(5, 5),
        slow=(COMPOSED[0],),
    ),
    Comparison(
        "windowed_layer_forward",
        peers=[*EAGER, *SDPA, BOUND, *PUBLISHED_COMPOSED, *COMPOSED],
        time_bar=2.0,
        reps=(9, 10),
    ),
    Comparison(
        "global_layer_train",
        peers=[*EAGER, *SDPA, BOUND, *PUBLISHED_COMPOSED, *COMPOSED],
        time_bar=2.2,
        memory_bar=(8.0, SDPA[0]),
        reps=(3, 3),
        slow=(PUBLISHED_COMPOSED[0], COMPOSED[0]),
    ),
    Comparison(
        "windowed_layer_train",
        peers=[EAGER[1], SDPA[1], PUBLISHED_COMPOSED[1], COMPOSED[1]],
        reps=(3, 5),
    ),
    Comparison(
        "encoder_forward",
        peers=[*EAGER, *SDPA, COMPILED, OPENVINO, ONNXRUNTIME, BOUND, *PUBLISHED_SAM, *CANDLE_SAM],
        time_bar=1.3,
        memory_bar=(3.0, SDPA[0]),
        resident_bar=(3.0, OPENVINO),
        reps=(2, 2),
        slow=(EAGER[0], COMPILED, PUBLISHED_SAM[0], CANDLE_SAM[0], BOUND, ONNXRUNTIME),
    ),
    Comparison(
        "encoder_train_step",
        peers=[*EAGER, *SDPA],
        time_bar=2.0,
        memory_bar=(3.0, SDPA[0]),
        reps=(1, 2),
        slow=(EAGER[0],),
    ),
]

# The mask decoder on a stored embedding: 64 prompts of one point, and one prompt of an embedding that was prompted
# before. The peers compute that as the first one. OpenVINO keeps its own memory, so the allocator does not matter to it.
DECODER = [
    Comparison("decoder_forward", {"batch": 64}, [*SDPA, OPENVINO], 3.0, (3.0, SDPA[0]), reps=(3, 3)),
    Comparison("decoder_prompt", peers=[SDPA[1], OPENVINO], time_bar=2.0, reps=(20, 20)),
    Comparison("decoder_train", {"batch": 16}, [*SDPA], reps=(1, 2), slow=(SDPA[0],)),
]

# The training step again, beside the one above: what gradient checkpointing costs in time and saves in memory.
CHECKPOINTED = Comparison("encoder_train_step_checkpointed", reps=(1, 2), rounds=(1, 1))

# Ratios within this crate: adapted over frozen, at most.
LORA_BAR = 1.05
LORA = [
    Comparison("global_layer_lora", reps=(7, 15)),
    Comparison("windowed_layer_lora", reps=(15, 30)),
    Comparison("qkv_lora", reps=(15, 30)),
    Comparison("qkv_lora", {"rank": 4}, reps=(15, 30)),
    Comparison("qkv_lora", {"rank": 64}, reps=(15, 30)),
    Comparison("windowed_layer_lora", {"rank": 4}, reps=(15, 30)),
    Comparison("windowed_layer_lora", {"rank": 64}, reps=(15, 30)),
]

# On a CPU without products of bf16: as fast as f32, a percent of noise aside.
WITHOUT_BF16 = [
    ("global_layer_forward", (3, 5)),
    ("windowed_layer_forward", (5, 10)),
    ("lin1_forward", (5, 10)),
    ("encoder_forward", (1, 2)),
    ("encoder_train_step", (1, 1)),
]
# Our f32 over our bf16, at least: of time, and of memory.
BF16_BARS = {
    "global_layer_forward": 1.7,
    "encoder_forward": 1.7,
    "encoder_train_step": 1.5,
    "decoder_forward batch=64": 1.5,
    **{f"{case} cpu=avx2": 0.99 for case, _ in WITHOUT_BF16},
}
BF16_MEMORY_BARS = {"encoder_train_step": 1 / 0.6}
BF16 = [
    Comparison("global_layer_forward", {"dtype": "bf16"}, peers=[SDPA[1]], reps=(5, 5), slow=(SDPA[1],)),
    Comparison(
        "encoder_forward",
        {"dtype": "bf16"},
        peers=[SDPA[1], OPENVINO],
        time_bar=1.1,
        reps=(3, 3),
        slow=(SDPA[1],),
    ),
    Comparison("encoder_train_step", {"dtype": "bf16"}, peers=[SDPA[1]], reps=(1, 2), slow=(SDPA[1],)),
    Comparison("decoder_forward", {"batch": 64, "dtype": "bf16"}, [SDPA[1], OPENVINO], reps=(3, 3)),
    *(Comparison(case, {"cpu": "avx2", "dtype": "bf16"}, reps=reps) for case, reps in WITHOUT_BF16),
]
# Their f32, which runs before them.
AVX2 = [Comparison(case, {"cpu": "avx2"}, reps=reps) for case, reps in WITHOUT_BF16]

# The frozen linear layers in int8, the rest in bf16 or f32. ONNX Runtime's CPU kernels know no bf16.
INT8 = [
    Comparison(
        "encoder_forward", {"dtype": "bf16", "quantize": "int8"}, peers=[OPENVINO], time_bar=1.0, reps=(3, 3)
    ),
    Comparison(
        "encoder_forward", {"quantize": "int8"}, peers=[OPENVINO, ONNXRUNTIME], reps=(3, 3), slow=(ONNXRUNTIME,)
    ),
    Comparison("encoder_train_step", {"dtype": "bf16", "quantize": "int8"}, reps=(1, 2), rounds=(1, 1)),
]

PROBES = [Comparison("gemm_peak", reps=(20, 50)), Comparison("copy_bandwidth", reps=(5, 20))]

# For the plots.
SWEEPS = [
    *(Comparison("global_layer_forward", {"grid": grid}, peers=SDPA, rounds=(1, 2)) for grid in (16, 32, 48)),
    *(
        Comparison("global_layer_forward", {"grid": 32, "batch": batch}, peers=[SDPA[1]], rounds=(1, 2))
        for batch in (2, 4)
    ),
]

CPU = [*PROBES, *BARS, CHECKPOINTED, *DECODER, *AVX2, *BF16, *INT8, *LORA, *SWEEPS]


# On a GPU, in the order in which they are run: time may end before the list does. No allocators of the host, no bars.
def on_gpu(case, peers=(), reps=20, **options):
    own = ("portable", "graph", "composed")
    peers = [Config("candle" if name in own else "pytorch", name) for name in peers]
    return Comparison(case, {"dtype": "bf16", **options}, peers=peers, reps=(reps // 4, reps), rounds=(1, 1))


GPU = [
    on_gpu("attention_forward", ["portable", "composed", "sdpa", "sdpa_without_bias", "flex", "triton"], batch=4),
    on_gpu("attention_train", ["portable", "composed", "sdpa", "flex"], batch=4),
    *(on_gpu("qkv_lora", batch=4, model=model) for model in "blh"),
    *(on_gpu(case, ["portable", "eager"], batch=4, model=model) for model in "blh" for case in ("qkv_forward", "qkv_train")),
    *(on_gpu("linear_forward", ["portable", "eager"], batch=4, model=model) for model in "blh"),
    *(on_gpu("lin1_forward", ["portable", "eager"], batch=4, model=model) for model in "blh"),
    # Peak memory of a training step; PEFT's LoRA is the peer.
    *(on_gpu("encoder_train_step", ["sdpa", "eager"], reps=8, model=model) for model in "blh"),
    on_gpu("encoder_forward", ["graph", "portable", "sdpa", "flex"], reps=8),
    on_gpu("encoder_forward", ["graph", "sdpa", "flex"], reps=8, batch=8),
    on_gpu("windowed_layer_forward", ["portable", "composed", "sdpa"], batch=8),
    on_gpu("windowed_layer_train", ["portable", "composed", "sdpa"], batch=8),
    on_gpu("global_layer_forward", ["portable", "composed", "eager", "sdpa", "sdpa_without_bias", "flex", "triton"]),
    on_gpu("global_layer_train", ["portable", "composed", "sdpa", "flex"]),
    *(on_gpu(case) for case in ("global_layer_lora", "windowed_layer_lora")),
    on_gpu("global_layer_forward", ["composed", "sdpa"], dtype="f32"),
    on_gpu("encoder_forward", ["sdpa"], reps=8, model="h"),
]
