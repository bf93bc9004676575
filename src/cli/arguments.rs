//! Options that several commands share: the model, where it runs, what may be replaced.

use super::console::Console;
use super::model::{self, Placement, Quantize, Source};
use crate::train::{device_of_rank, Communicator};
use crate::Error;
use anyhow::bail;
use candle_core::DType;
use clap::ValueEnum;
use std::path::PathBuf;

/// A model, perhaps with an adapter
#[derive(clap::Args, Clone, Debug)]
pub struct ModelArguments {
    /// File of weights or folder with them, or, with the feature `hub`, OWNER/NAME[@REVISION] on the Hugging Face hub.
    /// [default: the adapter's base model; without an adapter, the small SAM of this project]
    #[arg(long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    /// Folder, file or name of a PEFT adapter, or a LoRA file of SAMed or micro-sam
    #[arg(long, value_name = "PATH|NAME")]
    adapter: Option<PathBuf>,
}

impl ModelArguments {
    /// Whether an adapter is named.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// The files that are meant.
    pub fn find(&self, console: Console) -> anyhow::Result<Source> {
        model::find(self.model.as_deref(), self.adapter.as_deref(), console)
    }
}

/// Refuses thresholds outside of 0 to 1.
pub fn check_fractions(flags: &[(&str, Option<f64>)]) -> anyhow::Result<()> {
    match flags.iter().find(|(_, value)| value.is_some_and(|v| !(0.0..=1.0).contains(&v))) {
        Some((flag, Some(value))) => bail!("{flag} is {value}, expected 0 to 1"),
        _ => Ok(()),
    }
}

/// Where a model runs
#[derive(clap::Args, Clone, Debug)]
pub struct Backend {
    /// cpu, cuda or cuda:N; with several processes on a host, cuda is a GPU for each
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Storage of frozen weights and activations; adapters and their optimizer are f32 always
    #[arg(long, value_enum, default_value_t = Storage::F32)]
    dtype: Storage,
    /// Store the frozen weights of the encoder's linear layers in so many bits, and multiply in them; on the CPU
    #[arg(long, value_enum, value_name = "TYPE")]
    quantize: Option<Quantize>,
}

/// Types of stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Storage {
    /// 32 bits
    F32,
    /// 16 bits, with the exponents of f32
    Bf16,
    /// 16 bits, finer than bf16, up to 65504
    F16,
}

impl From<Storage> for DType {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::F32 => Self::F32,
            Storage::Bf16 => Self::BF16,
            Storage::F16 => Self::F16,
        }
    }
}

impl Backend {
    /// Opens the device of this process.
    ///
    /// On the CPU the heavy work is in this crate's operations, which have threads of their own. Candle's elementwise
    /// ones wait for each other by spinning, which on a busy machine takes several times longer than one thread would.
    /// They get one, unless `CANDLE_NUM_THREADS` says otherwise. The results are the same, bit for bit.
    pub fn open(&self, processes: &dyn Communicator) -> crate::Result<Placement> {
        const THREADS: &str = "CANDLE_NUM_THREADS";
        if std::env::var_os(THREADS).is_none() {
            std::env::set_var(THREADS, "1");
        }
        let device = device_of_rank(&self.device, processes)?;
        if self.quantize.is_some() && !device.is_cpu() {
            return Err(Error::config("--quantize is for --device cpu"));
        }
        Ok(Placement { device, dtype: self.dtype.into(), quantize: self.quantize })
    }
}
