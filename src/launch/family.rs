//! Families of native kernels: what is tested, trusted and refused as one.

use candle_core::DType;
use std::fmt;

/// An architecture's own kernels for an operation's forward and backward: tested, trusted and refused together, for
/// each dtype.
///
/// [Example](crate::guide::cuda)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `rel_pos_attention_{fwd,bwd_query,bwd_key}_sm90`
    GlobalAttention {
        /// Channels of a head.
        head_dim: usize,
    },
    /// `rel_pos_attention_window_{fwd,bwd}_sm90`
    WindowAttention {
        /// Channels of a head.
        head_dim: usize,
    },
    /// `projection_fwd_sm90` and `projection_bwd_input_sm90`
    Projection,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 5] = [
        Self::GlobalAttention { head_dim: 64 },
        Self::GlobalAttention { head_dim: 80 },
        Self::WindowAttention { head_dim: 64 },
        Self::WindowAttention { head_dim: 80 },
        Self::Projection,
    ];
    /// The dtypes that they have kernels for.
    pub const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GlobalAttention { head_dim } => write!(f, "global attention hd{head_dim}"),
            Self::WindowAttention { head_dim } => write!(f, "window attention hd{head_dim}"),
            Self::Projection => f.write_str("projection"),
        }
    }
}
