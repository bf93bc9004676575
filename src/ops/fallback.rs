//! Operations that run as a graph of candle's say so: an event of `tracing` with the target
//! `candle_sam_lora::composed`.

use candle_core::Tensor;

/// The reason where a device has no kernel of this crate's for the problem.
pub(super) const NO_KERNEL: &str = "no kernel of this device computes it";

/// Tells that an operation's composed graph runs and why.
pub(super) fn tell(op: &'static str, x: &Tensor, reason: &'static str) {
    let (dtype, shape) = (x.dtype().as_str(), x.dims());
    tracing::debug!(target: "candle_sam_lora::composed", op, reason, dtype, ?shape);
}
