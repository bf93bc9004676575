//! The operations by the kernels of a GPU with tiles of one's choice, for measurements.

use super::custom::Engine;
use super::{Activation, Projection, RelPosAttention};
use crate::launch::tiles::Forced;
use crate::launch::Gpu;
use candle_core::{Device, Result, Tensor};

/// The GPU with these tiles; none if the build has no kernels for it.
///
/// # Errors
/// If the device is no GPU.
pub fn gpu(device: &Device, forced: Forced) -> Result<Option<Gpu>> {
    let gpu = crate::driver::gpu(device.as_cuda_device()?);
    Ok(gpu.map(|gpu| Gpu { forced, ..gpu }))
}

/// [`super::rel_pos_attention`] by this GPU's kernels.
///
/// # Errors
/// As [`super::rel_pos_attention`], and on problems that no kernel covers.
pub fn rel_pos_attention(qkv: &Tensor, config: &RelPosAttention<'_>, gpu: Gpu) -> Result<Tensor> {
    super::rel_pos_attention::by(qkv, config, Engine::Gpu(gpu))
}

/// One or three projections by this GPU's kernels; shapes are not checked.
///
/// # Errors
/// On problems that no kernel covers.
pub fn projections(
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: Activation,
    residual: Option<&Tensor>,
    gpu: Gpu,
) -> Result<Tensor> {
    super::projection::by(x, projections, activation, residual, Engine::Gpu(gpu))
}
