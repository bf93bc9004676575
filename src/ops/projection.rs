//! Linear projections with LoRA: [`lora_linear`] is one, [`lora_qkv`] three that share their input.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p * (drop_p(x) A_p^T B_p^T + lora_bias_p)      for each projection p
//! out = act(cat(y_0 .. y_n)) + residual
//! ```
//!
//! q, k and v stay three tensors under three names, for checkpoints, adapters and users; the operation writes
//! them side by side into one packed output, so nothing is ever concatenated.

use super::{check, composed};
use crate::philox::Dropout;
use candle_core::{bail, Result, Tensor};

/// The low-rank part of a projection.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// `[rank, in]`
    pub a: &'a Tensor,
    /// `[out, rank]`
    pub b: &'a Tensor,
    /// `[out]`; multiplied by `scaling` too, as in PEFT.
    pub b_bias: Option<&'a Tensor>,
    /// Factor of the whole low-rank part.
    pub scaling: f64,
    /// Dropout on the input of `a`, over the elements of `x` seen as `[rows, in]`.
    pub dropout: Option<Dropout>,
}

/// One projection: base weight, bias, adapter.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[out, in]`
    pub weight: &'a Tensor,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// The adapter, if any.
    pub lora: Option<Lora<'a>>,
}

/// What is applied to the sum of base and low-rank part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// The exact GELU, `x/2 (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `max(x, 0)`
    Relu,
}

impl Activation {
    /// Applies the activation with candle's operations.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            Self::Gelu => x.gelu_erf(),
            Self::Relu => x.relu(),
        }
    }
}

/// A linear layer with LoRA, activation and residual: `x [.., in] -> [.., out]`; `residual` is `[.., out]`.
///
/// Gradients go to `x`, `residual`, the biases and the adapter; a weight that is a variable gets one too, on the
/// slower composed path. Adapters may be f32 while `x` and the weight are f16 or bf16.
///
/// # Errors
/// On shapes that do not fit, mixed dtypes or devices, non-finite scaling, impossible dropout.
pub fn lora_linear(
    x: &Tensor,
    projection: &Projection<'_>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    const OP: &str = "lora-linear";
    validate(OP, x, projection)?;
    if let Some(residual) = residual {
        let mut expected = x.dims().to_vec();
        if let Some(last) = expected.last_mut() {
            *last = projection.weight.dims()[0];
        }
        check::shape(OP, "residual", residual, &expected)?;
        check::same_kind(OP, "residual", residual, x)?;
    }
    composed::lora_linear(x, projection, activation, residual)
}

/// The q, k and v projections of attention, packed: `x [.., C] -> [.., 3C]`, q first, then k, then v.
///
/// Any subset may carry LoRA, each with its own rank, scaling and dropout mask. Gradients as in [`lora_linear`].
///
/// # Errors
/// As [`lora_linear`]; besides, the three projections must have equal output widths.
pub fn lora_qkv(x: &Tensor, projections: &[Projection<'_>; 3]) -> Result<Tensor> {
    const OP: &str = "lora-qkv";
    for projection in projections {
        validate(OP, x, projection)?;
    }
    let [q, k, v] = projections.each_ref().map(|p| p.weight.dims()[0]);
    if q != k || k != v {
        bail!("{OP}: q, k and v must have equal output widths, got {q}, {k} and {v}")
    }
    composed::lora_qkv(x, projections)
}

fn validate(op: &'static str, x: &Tensor, projection: &Projection<'_>) -> Result<()> {
    check::float(op, "x", x)?;
    check::not_empty(op, "x", x)?;
    let weight = projection.weight;
    check::not_empty(op, "weight", weight)?;
    check::same_kind(op, "weight", weight, x)?;
    let in_dim = x.dims()[x.rank() - 1];
    if weight.rank() != 2 || weight.dims()[1] != in_dim {
        bail!("{op}: weight must have shape [out, {in_dim}], got {:?}", weight.dims())
    }
    let out_dim = weight.dims()[0];
    if let Some(bias) = projection.bias {
        check::shape(op, "bias", bias, &[out_dim])?;
        check::same_kind(op, "bias", bias, x)?;
    }
    let Some(lora) = &projection.lora else { return Ok(()) };
    let rank = lora.a.dims().first().copied().unwrap_or(0);
    if rank == 0 {
        bail!(
            "{op}: lora A must have shape [rank, {in_dim}] with rank >= 1, got {:?}",
            lora.a.dims()
        )
    }
    check::shape(op, "lora A", lora.a, &[rank, in_dim])?;
    check::shape(op, "lora B", lora.b, &[out_dim, rank])?;
    for (name, tensor) in
        [("lora A", Some(lora.a)), ("lora B", Some(lora.b)), ("lora bias", lora.b_bias)]
    {
        if let Some(tensor) = tensor {
            check::float(op, name, tensor)?;
            check::same_device(op, name, tensor, x)?;
        }
    }
    if let Some(bias) = lora.b_bias {
        check::shape(op, "lora bias", bias, &[out_dim])?;
    }
    check::finite(op, "scaling", lora.scaling)?;
    lora.dropout.map_or(Ok(()), |dropout| dropout.validate(op))
}
