//! The error of everything that touches files, configurations or names.
//!
//! Operations and `forward` functions return [`candle_core::Result`], as candle users expect; loaders, savers
//! and the LoRA surgery return this one. Either converts into the other, so `?` works in both directions.

use std::path::{Path, PathBuf};

/// A failure outside an operation: files, configurations, names.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::VarBuilder;
/// use candle_sam_lora::sam::{checkpoint, AttentionKind, SamConfig, SamModel};
/// use candle_sam_lora::Error;
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let mut config = SamConfig::load("assets/tiny-sam/config.json")?;
/// config.vision_config.num_hidden_layers += 1;
/// let mut sam = SamModel::new(&config, AttentionKind::Fused, zeros)?;
/// match checkpoint::load(&mut sam, "assets/tiny-sam") {
///     Err(Error::Mismatch(all)) => assert!(all.missing[0].starts_with("vision_encoder.layers.4.")),
///     _ => panic!("the checkpoint has four layers"),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A file was read, but its content is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file concerned.
        path: PathBuf,
        /// The expected content and the found one.
        message: String,
    },
    /// Checkpoint and model disagree: every missing, surplus and mis-shaped tensor, listed by name.
    #[error("{0}")]
    Mismatch(Box<TensorMismatch>),
    /// A configuration that no model can have, or that is not supported.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// Gradients that are missing or wrong, by the names of their parameters.
    #[error("gradients: {0}")]
    Gradients(String),
    /// A name that is neither a folder nor to be had from the hub, see [`hub`](crate::hub).
    #[error("{name}: no such file or folder here; {message}")]
    Hub {
        /// The given name.
        name: String,
        /// Why the hub did not give it.
        message: String,
    },
    /// The work of one of the processes that train together failed, see [`Communicator`](crate::train::Communicator).
    #[error("rank {rank}: {message}")]
    Rank {
        /// The number of the process.
        rank: usize,
        /// The error message of that process.
        message: String,
    },
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of everything that touches files, configurations or names.
///
/// [Example](crate::Error)
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An I/O error at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A content error in the file at `path`.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// A configuration error.
    pub fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into())
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// How a set of named tensors differs from what a model wants.
///
/// [Example](crate::Error)
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TensorMismatch {
    /// Where the tensors come from, for the message.
    pub source: String,
    /// Which kind of file differs in this way, if that can be told.
    pub note: Option<String>,
    /// Names the model wants and the source lacks.
    pub missing: Vec<String>,
    /// Names the source has and the model does not know.
    pub surplus: Vec<String>,
    /// Name, expected shape, found shape.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl TensorMismatch {
    /// True when nothing differs.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.surplus.is_empty() && self.misshaped.is_empty()
    }
}

impl std::fmt::Display for TensorMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} does not fit the model: {} missing, {} surplus, {} mis-shaped tensors",
            self.source,
            self.missing.len(),
            self.surplus.len(),
            self.misshaped.len()
        )?;
        if let Some(note) = &self.note {
            write!(f, "; {note}")?;
        }
        for name in &self.missing {
            write!(f, "\n  missing: {name}")?;
        }
        for name in &self.surplus {
            write!(f, "\n  surplus: {name}")?;
        }
        for (name, expected, found) in &self.misshaped {
            write!(f, "\n  shape: {name}: expected {expected:?}, found {found:?}")?;
        }
        Ok(())
    }
}
