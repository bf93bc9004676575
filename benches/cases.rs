//! One case in a process of its own: times, CPU time and peak memory as one line of JSON.
//!
//! ```text
//! cargo bench --bench cases -- --case global_layer_forward --reps 5
//! cargo bench --bench cases -- --list
//! ```
//! A fresh process is what makes the peak of the resident memory meaningful; `benches/report/run.py` starts these in
//! turns with the peers'. Keys of the JSON, the same in `benches/peers/run.py`:
//!
//! | key | value |
//! |---|---|
//! | `first_s` | the first run, which pays for fresh pages |
//! | `wall_s`, `cpu_s` | each further run |
//! | `memory` | bytes by which the peak of the resident memory grew since before the first run; on a GPU, of the tensors' memory |
//! | `resident` | the peak of the resident memory, less what was resident before the model was made: weights and all |
//! | `gpu_peak` | on a GPU, the peak itself, weights and all |
//! | `flops`, `bytes` | see `support/work.rs` |

mod support;

use anyhow::{bail, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use candle_sam_lora::nn::{quantize_int8, trainable_variables, Linear, Mode, ModuleTree};
use candle_sam_lora::ops::{self, Activation};
use candle_sam_lora::sam::{SamVisionAttentionSplit, VisionAttention};
use candle_sam_lora::testing::{allow_instructions, composed as ops_composed, Instructions};
use candle_sam_lora::train::{AdamW, AdamWConfig};
use clap::{Parser, ValueEnum};
use serde_json::json;
use std::process::ExitCode;
use support::clock::{self, Measurement};
use support::memory::{peak_resident, resident};
use support::models::{self, Adapters, Prompts, FROZEN};
use support::probe;
use support::vit::{Vit, VIT_B, VIT_H, VIT_L};
use support::work::{Pass, Work};
use support::{composed, normal, Rotating};

/// A measured case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Case {
    /// x W^T + b, [B H W, C] -> [.., 3C]
    LinearForward,
    /// GELU(x W^T + b), [B H W, C] -> [.., 4C]: the first linear of the MLP.
    Lin1Forward,
    /// The attention operation alone, global, from packed qkv.
    AttentionForward,
    /// As AttentionForward, forward and backward.
    AttentionTrain,
    /// Attention layer qkv..proj, global.
    GlobalLayerForward,
    /// Attention layer qkv..proj in windows of 14 x 14, partition included.
    WindowedLayerForward,
    /// Attention layer with LoRA on q and v, forward and backward down to x, global.
    GlobalLayerTrain,
    /// As GlobalLayerTrain, in windows.
    WindowedLayerTrain,
    /// The adapted global layer beside the frozen one, in turns.
    GlobalLayerLora,
    /// The adapted windowed layer beside the frozen one, in turns.
    WindowedLayerLora,
    /// The adapted q, k, v projections beside the frozen ones, in turns.
    QkvLora,
    /// The adapted q, k, v projections with dropout.
    QkvForward,
    /// As QkvForward, forward and backward down to x.
    QkvTrain,
    /// The whole image encoder.
    EncoderForward,
    /// Forward, backward and AdamW step of the image encoder with LoRA on q and v.
    EncoderTrainStep,
    /// As EncoderTrainStep, with gradient checkpointing.
    EncoderTrainStepCheckpointed,
    /// The mask decoder on a stored embedding, a prompt of one point for each of the batch.
    DecoderForward,
    /// As DecoderForward, of an embedding that is prepared for many prompts, as a predictor does it.
    DecoderPrompt,
    /// As DecoderForward, forward and backward down to the embedding.
    DecoderTrain,
    /// The f32 product [4096, 768] x [768, 2304] into memory that is there: the machine's arithmetic.
    GemmPeak,
    /// Copy of 256 MiB by all threads: the machine's memory.
    CopyBandwidth,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Implementation {
    /// This crate's operations.
    Ours,
    /// This crate's operations by the kernels that run on every GPU.
    Portable,
    /// This crate's encoder, replayed from a CUDA graph.
    Graph,
    /// This crate's modules written with candle's own operations.
    Composed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Model {
    B,
    L,
    H,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Quantize {
    Int8,
}

/// Instructions of the CPU that this crate's operations may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cpu {
    /// All that this machine has.
    Native,
    /// As on a machine without AVX-512.
    Avx2,
    /// As on a machine without vectors that this crate knows.
    Scalar,
}

#[derive(Parser)]
#[command(about = "Measures one case and prints it as JSON")]
struct Args {
    /// The case to measure.
    #[arg(long)]
    case: Option<Case>,
    #[arg(long, default_value = "ours")]
    implementation: Implementation,
    #[arg(long, default_value = "b")]
    model: Model,
    /// Tokens a side; 64 is an image of 1024 x 1024.
    #[arg(long, default_value_t = 64)]
    grid: usize,
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Rank of the adapters on q and v, where the case has any.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Dropout on the adapters' input, in the training cases.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// int8: frozen weights of the encoder's linear layers
    #[arg(long)]
    quantize: Option<Quantize>,
    /// avx2 or scalar: as on a machine without AVX-512, or without vectors
    #[arg(long, default_value = "native")]
    cpu: Cpu,
    /// Runs after the first.
    #[arg(long, default_value_t = 3)]
    reps: usize,
    /// Prints the names of the cases.
    #[arg(long)]
    list: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    // `cargo bench` starts every benchmark, with criterion's arguments: not for this one.
    let asked = |argument: String| {
        ["--case", "--list", "--help", "-h"].iter().any(|name| argument.starts_with(name))
    };
    if !std::env::args().any(asked) {
        return Ok(());
    }
    let args = Args::parse();
    let Some(case) = args.case else {
        for case in Case::value_variants().iter().filter(|_| args.list) {
            println!("{}", name(case));
        }
        return Ok(());
    };
    allow_instructions(match args.cpu {
        Cpu::Native => Instructions::All,
        Cpu::Avx2 => Instructions::Avx2,
        Cpu::Scalar => Instructions::Scalar,
    });
    let device = support::device()?;
    if args.implementation == Implementation::Portable {
        portable(&device)?;
    }
    let dtype: DType = args.dtype.parse()?;
    let setup = Setup {
        implementation: args.implementation,
        vit: match args.model {
            Model::B => VIT_B,
            Model::L => VIT_L,
            Model::H => VIT_H,
        },
        grid: args.grid,
        batch: args.batch,
        adapters: Adapters { rank: args.rank, dropout: args.dropout },
        quantize: args.quantize,
        dtype,
        device: &device,
        reps: args.reps,
    };
    let before = resident();
    let (measured, work) = setup.measure(case)?;
    let resident = peak_resident().zip(before).map(|(peak, before)| peak.saturating_sub(before));
    let line = json!({
        "case": name(&case),
        "implementation": name(&args.implementation),
        "config": {
            "model": setup.vit.name, "grid": args.grid, "batch": args.batch, "rank": args.rank,
            "dropout": args.dropout, "dtype": args.dtype,
            "quantize": args.quantize.as_ref().map(name),
            "cpu": name(&args.cpu),
            "device": std::env::var("CANDLE_SAM_DEVICE").unwrap_or_else(|_| "cpu".into()),
            "threads": rayon::current_num_threads(),
        },
        "first_s": measured.first_s,
        "wall_s": measured.wall_s,
        "base_wall_s": measured.base_wall_s,
        "cpu_s": measured.cpu_s,
        "memory": measured.memory,
        "resident": resident,
        "gpu_peak": measured.gpu_peak,
        "flops": work.flops,
        "bytes": work.bytes,
    });
    println!("{line}");
    Ok(())
}

/// q, k and v of a layer, by one operation or by the composed one.
fn project(attn: &SamVisionAttentionSplit, x: &Tensor, mode: Mode, ours: bool) -> Result<Tensor> {
    let parts = [&attn.q, &attn.k, &attn.v];
    let [q, k, v] = parts.map(|part| part.low_rank(mode));
    let low_rank = [q?, k?, v?];
    let projection = |i: usize| parts[i].projection(&low_rank[i]);
    let (Some(q), Some(k), Some(v)) = (projection(0), projection(1), projection(2)) else {
        bail!("LoRA is a projection")
    };
    let run = if ours { ops::lora_qkv } else { ops_composed::lora_qkv };
    Ok(run(x, &[q, k, v])?)
}

/// Takes the portable kernels, where there are others.
fn portable(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    {
        use candle_sam_lora::cuda::{available_kernels, set_kernels, Kernels};
        if available_kernels(device).contains(&Kernels::Portable) {
            set_kernels(Kernels::Portable);
            return Ok(());
        }
    }
    bail!("{device:?} has the portable kernels only, or none: that is `ours`")
}

fn name<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

struct Setup<'a> {
    implementation: Implementation,
    vit: Vit,
    grid: usize,
    batch: usize,
    adapters: Adapters,
    quantize: Option<Quantize>,
    dtype: DType,
    device: &'a Device,
    reps: usize,
}

impl Setup<'_> {
    fn measure(&self, case: Case) -> Result<(Measurement, Work)> {
        let forward = Pass::forward(self.batch, self.grid, self.dtype.size_in_bytes());
        let train = forward.with_backward();
        let (vit, rank) = (&self.vit, self.adapters.rank);
        Ok(match case {
            Case::LinearForward => {
                (self.linear(3, Activation::Identity)?, forward.linear(vit.dim, 3 * vit.dim))
            }
            Case::Lin1Forward => {
                (self.linear(4, Activation::Gelu)?, forward.linear(vit.dim, 4 * vit.dim))
            }
            Case::AttentionForward => (self.attention(false)?, forward.attention(vit, false)),
            Case::AttentionTrain => (self.attention(true)?, train.attention(vit, false)),
            Case::GlobalLayerForward | Case::WindowedLayerForward => {
                let windowed = case == Case::WindowedLayerForward;
                (self.layer_forward(windowed)?, forward.attention_layer(vit, windowed, 0))
            }
            Case::GlobalLayerTrain | Case::WindowedLayerTrain => {
                let windowed = case == Case::WindowedLayerTrain;
                (self.layer_train(windowed)?, train.attention_layer(vit, windowed, rank))
            }
            Case::GlobalLayerLora | Case::WindowedLayerLora => {
                let windowed = case == Case::WindowedLayerLora;
                (self.layer_lora(windowed)?, forward.attention_layer(vit, windowed, rank))
            }
            Case::QkvLora => (self.qkv_lora()?, forward.qkv(vit.dim, rank)),
            Case::QkvForward => (self.qkv(false)?, forward.qkv(vit.dim, rank)),
            Case::QkvTrain => (self.qkv(true)?, train.qkv(vit.dim, rank)),
            Case::EncoderForward => (self.encoder_forward()?, forward.encoder(vit, 0)),
            Case::EncoderTrainStep | Case::EncoderTrainStepCheckpointed => {
                let checkpointed = case == Case::EncoderTrainStepCheckpointed;
                (self.encoder_train_step(checkpointed)?, train.encoder(vit, rank))
            }
            Case::DecoderForward => (self.decoder(false)?, forward.decoder()),
            Case::DecoderPrompt => (self.decoder_prompt()?, forward.decoder()),
            Case::DecoderTrain => (self.decoder(true)?, train.decoder()),
            Case::GemmPeak => probe::gemm_peak(self.reps)?,
            Case::CopyBandwidth => probe::copy_bandwidth(self.reps)?,
        })
    }

    fn run(&self, run: impl FnMut() -> Result<()>) -> Result<Measurement> {
        clock::measure(self.reps, self.device, run)
    }

    fn ours(&self) -> Result<bool> {
        match self.implementation {
            Implementation::Ours | Implementation::Portable => Ok(true),
            Implementation::Composed => Ok(false),
            Implementation::Graph => bail!("only the encoder is replayed from a graph"),
        }
    }

    fn tokens(&self, channels: usize) -> Result<Tensor> {
        Ok(normal(&[self.batch, self.grid, self.grid, channels], self.dtype, self.device)?)
    }

    /// A linear to `times` as many channels.
    fn linear(&self, times: usize, activation: Activation) -> Result<Measurement> {
        let (ours, dim) = (self.ours()?, self.vit.dim);
        let x = Rotating::new(self.tokens(dim)?)?;
        let weight = normal(&[times * dim, dim], self.dtype, self.device)?;
        let bias = normal(&[times * dim], self.dtype, self.device)?;
        let mut layer = Linear::new(weight, Some(bias));
        self.quantize(&mut layer)?;
        let projection = layer.projection(&[]).context("no adapter")?;
        self.run(|| {
            let run = if ours { ops::lora_linear } else { ops_composed::lora_linear };
            run(x.next(), &projection, activation, None)?;
            Ok(())
        })
    }

    fn attention(&self, train: bool) -> Result<Measurement> {
        let ours = self.ours()?;
        let mut qkv = self.tokens(3 * self.vit.dim)?;
        if train {
            qkv = Var::from_tensor(&qkv)?.into_inner();
        }
        let qkv = Rotating::new(qkv)?;
        let length = 2 * self.grid - 1;
        let table = || normal(&[length, self.vit.head_dim()], self.dtype, self.device)? * 0.02;
        let (rel_pos_h, rel_pos_w) = (table()?, table()?);
        let config = ops::RelPosAttention {
            num_heads: self.vit.heads,
            softmax_scale: (self.vit.head_dim() as f64).powf(-0.5),
            rel_pos: Some((&rel_pos_h, &rel_pos_w)),
            window: None,
            pad: None,
            dropout: None,
        };
        self.run(|| {
            let out = if ours {
                ops::rel_pos_attention(qkv.next(), &config)?
            } else {
                ops_composed::rel_pos_attention(qkv.next(), &config)?.0
            };
            if train {
                out.sqr()?.mean_all()?.backward()?;
            }
            Ok(())
        })
    }

    fn layer_forward(&self, windowed: bool) -> Result<Measurement> {
        let ours = self.ours()?;
        let attn =
            models::attention(&self.vit, self.grid, windowed, FROZEN, self.dtype, self.device)?;
        let x = Rotating::new(self.tokens(self.vit.dim)?)?;
        self.run(|| {
            if ours {
                attn.forward(x.next(), Mode::Eval)?;
            } else {
                composed::attention(&attn, x.next(), Mode::Eval)?;
            }
            Ok(())
        })
    }

    fn layer_train(&self, windowed: bool) -> Result<Measurement> {
        let ours = self.ours()?;
        let (vit, grid) = (&self.vit, self.grid);
        let attn = models::attention(vit, grid, windowed, self.adapters, self.dtype, self.device)?;
        let x = Rotating::new(Var::from_tensor(&self.tokens(vit.dim)?)?.into_inner())?;
        let mut seed = 0;
        self.run(|| {
            seed += 1;
            let mode = Mode::Train { seed };
            let out = if ours {
                attn.forward(x.next(), mode)?
            } else {
                composed::attention(&attn, x.next(), mode)?
            };
            out.sqr()?.mean_all()?.backward()?;
            Ok(())
        })
    }

    fn layer_lora(&self, windowed: bool) -> Result<Measurement> {
        let layer = |adapters| {
            models::attention(&self.vit, self.grid, windowed, adapters, self.dtype, self.device)
        };
        let (adapted, frozen) = (layer(self.adapters)?, layer(FROZEN)?);
        let x = self.tokens(self.vit.dim)?;
        self.in_turns(
            || Ok(adapted.forward(&x, Mode::Eval)?),
            || Ok(frozen.forward(&x, Mode::Eval)?),
        )
    }

    fn qkv_lora(&self) -> Result<Measurement> {
        let layer = |adapters| {
            models::attention(&self.vit, self.grid, false, adapters, self.dtype, self.device)
        };
        let (adapted, frozen) = (layer(self.adapters)?, layer(FROZEN)?);
        let x = self.tokens(self.vit.dim)?;
        self.in_turns(
            || project(&adapted, &x, Mode::Eval, true),
            || project(&frozen, &x, Mode::Eval, true),
        )
    }

    fn qkv(&self, train: bool) -> Result<Measurement> {
        let (vit, ours) = (&self.vit, self.ours()?);
        let attn =
            models::attention(vit, self.grid, false, self.adapters, self.dtype, self.device)?;
        let mut x = self.tokens(vit.dim)?;
        if train {
            x = Var::from_tensor(&x)?.into_inner();
        }
        let x = Rotating::new(x)?;
        let mut seed = 0;
        self.run(|| {
            seed += 1;
            let out = project(&attn, x.next(), Mode::Train { seed }, ours)?;
            if train {
                out.sqr()?.mean_all()?.backward()?;
            }
            Ok(())
        })
    }

    /// The adapted beside the frozen one.
    fn in_turns(
        &self,
        adapted: impl Fn() -> Result<Tensor>,
        frozen: impl Fn() -> Result<Tensor>,
    ) -> Result<Measurement> {
        if !self.ours()? {
            bail!("a ratio within this crate has no other implementation")
        }
        clock::measure_in_turns(
            self.reps,
            self.device,
            || adapted().map(drop),
            || frozen().map(drop),
        )
    }

    fn pixels(&self) -> Result<Tensor> {
        let side = 16 * self.grid;
        Ok(normal(&[self.batch, 3, side, side], self.dtype, self.device)?)
    }

    fn quantize(&self, encoder: &mut dyn ModuleTree) -> Result<()> {
        if let Some(Quantize::Int8) = self.quantize {
            quantize_int8(encoder)?;
        }
        Ok(())
    }

    fn encoder_forward(&self) -> Result<Measurement> {
        let pixels = self.pixels()?;
        let config = self.vit.config(self.grid);
        let mut encoder = models::encoder(&config, FROZEN, self.dtype, self.device)?;
        self.quantize(&mut encoder)?;
        if self.implementation == Implementation::Graph {
            return self.replay(&pixels, |x| encoder.forward(x, Mode::Eval));
        }
        let ours = self.ours()?;
        self.run(|| {
            if ours {
                encoder.forward(&pixels, Mode::Eval)?;
            } else {
                composed::encoder(&encoder, &pixels, Mode::Eval)?;
            }
            Ok(())
        })
    }

    #[cfg(feature = "cuda")]
    fn replay(
        &self,
        x: &Tensor,
        forward: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Measurement> {
        let graphed = candle_sam_lora::cuda::Graphed::capture(x, forward)?;
        self.run(|| graphed.run(x).map(drop).map_err(Into::into))
    }

    #[cfg(not(feature = "cuda"))]
    fn replay(
        &self,
        _: &Tensor,
        _: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Measurement> {
        bail!("CUDA graphs want the feature cuda")
    }

    fn decoder(&self, train: bool) -> Result<Measurement> {
        if !self.ours()? {
            bail!("the mask decoder has no composed twin")
        }
        let decoder = models::decoder(self.dtype, self.device)?;
        let mut prompts = Prompts::new(self.batch, self.grid, self.dtype, self.device)?;
        if train {
            prompts.image = Var::from_tensor(&prompts.image)?.into_inner();
        }
        self.run(|| {
            let mode = if train { Mode::Train { seed: 1 } } else { Mode::Eval };
            let masks = prompts.decode(&decoder, mode)?;
            if train {
                masks.sqr()?.mean_all()?.backward()?;
            }
            Ok(())
        })
    }

    fn decoder_prompt(&self) -> Result<Measurement> {
        if !self.ours()? {
            bail!("the mask decoder has no composed twin")
        }
        let decoder = models::decoder(self.dtype, self.device)?;
        let prompts = Prompts::new(self.batch, self.grid, self.dtype, self.device)?;
        let images = prompts.prepare(&decoder)?;
        self.run(|| {
            decoder.prompt(&images, Some(&prompts.sparse), 1..4, Mode::Eval)?;
            Ok(())
        })
    }

    fn encoder_train_step(&self, checkpointed: bool) -> Result<Measurement> {
        let ours = self.ours()?;
        if checkpointed && !ours {
            bail!("gradient checkpointing is this crate's")
        }
        let pixels = self.pixels()?;
        let config = self.vit.config(self.grid);
        let mut encoder = models::encoder(&config, self.adapters, self.dtype, self.device)?;
        encoder.gradient_checkpointing = checkpointed;
        self.quantize(&mut encoder)?;
        let mut optimizer = AdamW::new(trainable_variables(&encoder)?, AdamWConfig::default())?;
        let mut seed = 0;
        self.run(|| {
            seed += 1;
            let mode = Mode::Train { seed };
            let out = if ours {
                encoder.forward(&pixels, mode)?
            } else {
                composed::encoder(&encoder, &pixels, mode)?
            };
            let gradients = out.to_dtype(DType::F32)?.sqr()?.mean_all()?.backward()?;
            optimizer.step(&gradients)?;
            Ok(())
        })
    }
}
