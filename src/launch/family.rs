//! Hopper's kernels in families, and whose kernels an operation launches.

use super::projection::sm90::forward::Hopper;
use super::projection::{self, Problem};
use super::rel_pos_attention::sm90::backward as attention_bwd_sm90;
use super::rel_pos_attention::sm90::forward as attention_sm90;
use super::rel_pos_attention::sm90::tiles::{self as attention_tiles, Tiles};
use super::rel_pos_attention::sm90::windows as windows_sm90;
use super::rel_pos_attention::{self as attention, Inputs};
use super::{device_ptr, AttentionProblem, Launch};
use candle_core::{DType, Result};
use std::fmt;

/// Hopper's kernels for an operation's forward and backward: tested, trusted and refused together, for each dtype.
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

    /// The family with kernels for an attention problem.
    pub fn of_attention(problem: &AttentionProblem, dtype: DType) -> Option<Self> {
        let head_dim = problem.head_dim;
        if windows_sm90::pick(problem, dtype, &[]).is_some() {
            return Some(Self::WindowAttention { head_dim });
        }
        let whole =
            problem.h.is_multiple_of(problem.side_h) && problem.w.is_multiple_of(problem.side_w);
        let covered = whole
            && attention_sm90::covers(problem, dtype, &[])
            && attention_tiles::pick(problem, None).is_some();
        covered.then_some(Self::GlobalAttention { head_dim })
    }

    /// The family with kernels for projections.
    pub fn of_projections(problem: &Problem<'_>, dtype: DType, device: Hopper) -> Option<Self> {
        let covered = projection::sm90::forward::covers(problem, dtype, device);
        covered.unwrap_or(false).then_some(Self::Projection)
    }
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

/// The kernels that an operation launches, in its forward and in its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implementation {
    /// Hopper's, where they cover the problem; else the portable ones.
    Native(Hopper),
    /// Those for every GPU from compute capability 8.0 on.
    Portable,
}

impl Implementation {
    fn hopper(self) -> Option<Hopper> {
        match self {
            Self::Native(device) => Some(device),
            Self::Portable => None,
        }
    }

    /// Those of Hopper's attention over whole grids.
    fn attention_tiles(self, problem: &AttentionProblem) -> Option<Tiles> {
        attention_tiles::pick(problem, self.hopper()?.forced.attention_cols)
    }

    /// The attention's forward.
    ///
    /// # Errors
    /// On problems that no kernel covers.
    pub fn attention_forward(
        self,
        problem: &AttentionProblem,
        dtype: DType,
        inputs: &Inputs,
        out: device_ptr,
        lse: device_ptr,
    ) -> Result<Vec<Launch>> {
        let native = match self.hopper().and_then(|_| Family::of_attention(problem, dtype)) {
            Some(Family::WindowAttention { .. }) => {
                windows_sm90::forward(problem, dtype, inputs, out, lse)?
            }
            Some(_) => match self.attention_tiles(problem) {
                Some(Tiles { forward: tile, .. }) => {
                    attention_sm90::forward_with(tile, problem, dtype, inputs, [out, lse])?
                }
                None => None,
            },
            None => None,
        };
        let portable = || attention::forward(problem, dtype, inputs, out, lse);
        native.map_or_else(portable, Ok).map(|launch| vec![launch])
    }

    /// The attention's backward.
    ///
    /// # Errors
    /// On problems that no kernel covers.
    pub fn attention_backward(
        self,
        problem: &AttentionProblem,
        dtype: DType,
        inputs: &Inputs,
        operands: &attention::BackwardOperands,
    ) -> Result<Vec<Launch>> {
        let native = match self.hopper().and_then(|_| Family::of_attention(problem, dtype)) {
            Some(Family::WindowAttention { .. }) => {
                windows_sm90::backward(problem, dtype, inputs, operands)?
            }
            Some(_) => match self.attention_tiles(problem) {
                Some(tiles) => {
                    attention_bwd_sm90::backward_with(tiles, problem, dtype, inputs, operands)?
                }
                None => None,
            },
            None => None,
        };
        native.map_or_else(|| attention::backward(problem, dtype, inputs, operands), Ok)
    }

    /// Scratch memory of the attention's backward.
    ///
    /// # Errors
    /// On problems that no kernel covers.
    pub fn attention_workspace_bytes(
        self,
        problem: &AttentionProblem,
        dtype: DType,
        train_tables: bool,
        train_pad: bool,
    ) -> Result<usize> {
        let portable = attention::workspace_bytes(problem, dtype, train_tables, train_pad)?;
        let windows = windows_sm90::workspace_bytes(problem, train_tables, train_pad);
        Ok(match self {
            Self::Native(_) => portable.max(windows),
            Self::Portable => portable,
        })
    }

    /// The projections' forward.
    ///
    /// # Errors
    /// On problems that no kernel covers.
    pub fn projection_forward(
        self,
        problem: &Problem<'_>,
        dtype: DType,
        operands: &projection::ForwardOperands<'_>,
    ) -> Result<Vec<Launch>> {
        let native = match self.hopper() {
            Some(device) => projection::sm90::forward::forward(problem, dtype, operands, device)?,
            None => None,
        };
        native.map_or_else(|| projection::forward(problem, dtype, operands), Ok)
    }

    /// The projections' backward.
    ///
    /// # Errors
    /// On problems that no kernel covers.
    pub fn projection_backward(
        self,
        problem: &Problem<'_>,
        dtype: DType,
        operands: &projection::BackwardOperands<'_>,
    ) -> Result<Vec<Launch>> {
        let native = match self.hopper() {
            Some(device) => projection::sm90::backward::backward(problem, dtype, operands, device)?,
            None => None,
        };
        native.map_or_else(|| projection::backward(problem, dtype, operands), Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::super::projection::{Activation, ProjectionProblem, Small};
    use super::super::rel_pos_attention::portable::tests::GLOBAL;
    use super::*;

    const WINDOWED: AttentionProblem = AttentionProblem { side_h: 14, side_w: 14, ..GLOBAL };
    const INPUTS: Inputs = Inputs { qkv: 64, tables: [128, 256], pad: 192 };

    /// The names of the kernels, without what follows their family.
    fn names(launches: Vec<Launch>) -> Vec<String> {
        let family = |launch: Launch| launch.kernel.split("_hd").next().map(str::to_string);
        launches.into_iter().filter_map(family).collect()
    }

    #[test]
    fn a_problem_has_at_most_one_family() {
        let of = |problem, dtype| Family::of_attention(&problem, dtype);
        let bf16 = DType::BF16;
        assert_eq!(of(GLOBAL, bf16), Some(Family::GlobalAttention { head_dim: 64 }));
        assert_eq!(of(WINDOWED, bf16), Some(Family::WindowAttention { head_dim: 64 }));
        let huge = AttentionProblem { head_dim: 80, ..GLOBAL };
        assert_eq!(of(huge, DType::F16), Some(Family::GlobalAttention { head_dim: 80 }));
        // Windows that hang over the grid and are too large for the windows' kernels.
        assert_eq!(of(AttentionProblem { side_h: 15, side_w: 15, ..GLOBAL }, bf16), None);
        assert_eq!(of(AttentionProblem { head_dim: 32, ..GLOBAL }, bf16), None);
        assert_eq!(of(GLOBAL, DType::F32), None);
    }

    #[test]
    fn forward_and_backward_are_of_one_implementation() -> Result<()> {
        for (problem, family) in
            [(GLOBAL, "rel_pos_attention_{}_sm90"), (WINDOWED, "rel_pos_attention_window_{}_sm90")]
        {
            let run = |implementation: Implementation| -> Result<[Vec<String>; 2]> {
                let operands = attention::BackwardOperands {
                    out: 16,
                    lse: 4,
                    dout: 32,
                    dqkv: 48,
                    dtables: 0,
                    dpad: 0,
                    workspace: 1 << 20,
                };
                let forward =
                    implementation.attention_forward(&problem, DType::F16, &INPUTS, 16, 4)?;
                let backward =
                    implementation.attention_backward(&problem, DType::F16, &INPUTS, &operands)?;
                Ok([names(forward), names(backward)])
            };
            let [forward, backward] = run(Implementation::Native(Hopper::new(132, true)))?;
            assert_eq!(forward, [family.replace("{}", "fwd")]);
            assert!(backward.iter().all(|name| name.ends_with("_sm90")), "{backward:?}");
            let [forward, backward] = run(Implementation::Portable)?;
            assert_eq!(forward, ["rel_pos_attention_fwd"]);
            assert!(!backward.iter().any(|name| name.ends_with("_sm90")), "{backward:?}");
        }
        Ok(())
    }

    #[test]
    fn projections_are_native_where_a_tile_is_chosen() -> Result<()> {
        let parts = [ProjectionProblem { out_dim: 768, bias: true, lora: None }];
        let activation = Activation::Identity;
        let large = Problem { rows: 4096, in_dim: 768, projections: &parts, activation };
        let of = |problem: &Problem<'_>, dtype| {
            Family::of_projections(problem, dtype, Hopper::new(132, true))
        };
        assert_eq!(of(&large, DType::BF16), Some(Family::Projection));
        assert_eq!(of(&large, DType::F32), None);
        assert_eq!(of(&Problem { rows: 196, ..large }, DType::BF16), None);
        assert_eq!(of(&Problem { in_dim: 767, ..large }, DType::BF16), None);

        let operands = projection::ForwardOperands {
            x: 256,
            weights: &[512],
            small: Small::Flat(1024),
            residual: 0,
            out: 2048,
            low_rank: 0,
            sum: 0,
        };
        let kernel = |implementation: Implementation| -> Result<String> {
            let launches = implementation.projection_forward(&large, DType::BF16, &operands)?;
            Ok(launches[0].kernel.clone())
        };
        let native = kernel(Implementation::Native(Hopper::new(132, true)))?;
        assert_eq!(native, "projection_fwd_sm90_pingpong_128x192_x2_bf16");
        assert!(!kernel(Implementation::Portable)?.contains("sm90"));
        Ok(())
    }
}
