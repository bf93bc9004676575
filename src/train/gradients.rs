//! The gradients of one step: summed over its parts, measured, clipped.
//!
//! ```text
//! norm = sqrt(sum over all parameters of |g|^2)          g <- g min(1, max_norm / (norm + 1e-6))
//! ```
//! In f32, whatever the parameters' dtype.
//!
//! Source: `torch.nn.utils.clip_grad_norm_`.

use crate::nn::ENDS_THE_GRAPH;
use crate::ops::optimizer::sum_of_squares;
use candle_core::{bail, DType, Result, Tensor, Var, D};

/// Added to the norm by PyTorch.
const EPS: f64 = 1e-6;

/// A gradient for every parameter of an optimizer, in its order.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use candle_sam_lora::train::{AdamW, AdamWConfig};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let weight = Var::ones(4, DType::F32, &Device::Cpu)?;
/// let mut optimizer = AdamW::new(vec![weight.clone()], AdamWConfig::default())?;
/// let gradients = optimizer.gradients(&weight.sqr()?.sum_all()?.backward()?)?;
/// let norm = gradients.norm()?;
/// assert_eq!(norm, 4.0); // of [2, 2, 2, 2]
/// optimizer.apply(&gradients, None, Some(1.0))?; // shortened to a norm of 1
/// assert_eq!(optimizer.steps(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Gradients {
    tensors: Vec<Tensor>,
}

impl Gradients {
    /// The gradients of `parameters`, which `find` finds.
    ///
    /// # Errors
    /// When parameters have none; they are named.
    pub fn of<'a>(
        parameters: impl Iterator<Item = (&'a str, &'a Var)>,
        find: impl Fn(&Var) -> Result<Option<Tensor>>,
    ) -> Result<Self> {
        let (mut names, mut tensors, mut missing) = (vec![], vec![], vec![]);
        for (name, var) in parameters {
            match find(var)? {
                Some(gradient) => {
                    names.push(name);
                    tensors.push(gradient.to_dtype(DType::F32)?);
                }
                None => missing.push(name),
            }
        }
        if !missing.is_empty() {
            bail!(
                "{} of {} trainable parameters got no gradient: {}. {}",
                missing.len(),
                missing.len() + names.len(),
                missing.join(", "),
                causes()
            )
        }
        Ok(Self { tensors })
    }

    /// The place of the first one that is not finite.
    pub(super) fn first_not_finite(&self) -> Result<Option<usize>> {
        first_not_finite(self.tensors.iter())
    }

    /// In the order of the parameters.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// How many elements they have together.
    pub(super) fn len(&self) -> usize {
        self.tensors.iter().map(Tensor::elem_count).sum()
    }

    /// All elements one after the other, in main memory.
    pub(super) fn to_vec(&self) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.len());
        for gradient in &self.tensors {
            values.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(values)
    }

    /// Gradients of the same shapes and on the same devices, with these elements.
    pub(super) fn with_values(&self, values: Vec<f32>) -> crate::Result<Self> {
        if values.len() != self.len() {
            let message = format!("{} gradients, expected {}", values.len(), self.len());
            return Err(crate::Error::Gradients(message));
        }
        let mut rest = values.as_slice();
        let tensors = self.tensors.iter().map(|like| {
            let (own, others) = rest.split_at(like.elem_count());
            rest = others;
            Tensor::from_slice(own, like.shape(), like.device())
        });
        Ok(Self { tensors: tensors.collect::<Result<_>>()? })
    }

    /// The sum of this and `other`, of the same parameters.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        let sums = self.tensors.iter().zip(&other.tensors).map(|(a, b)| a + b);
        Ok(Self { tensors: sums.collect::<Result<_>>()? })
    }

    /// The 2-norm of all of them together.
    pub fn norm(&self) -> Result<f64> {
        if self.tensors.iter().all(|g| g.device().is_cpu()) {
            let squares = self.tensors.iter().map(sum_of_squares).collect::<Result<Vec<_>>>()?;
            return Ok(squares.iter().sum::<f64>().sqrt());
        }
        // By rows first, so that no sum of millions loses its small terms.
        let squares = self.tensors.iter().map(|g| match g.rank() {
            0 => g.sqr(),
            1 => g.sqr()?.sum_all(), // candle cannot sum a scalar on a GPU
            _ => g.sqr()?.sum(D::Minus1)?.sum_all(),
        });
        let squares = Tensor::stack(&squares.collect::<Result<Vec<_>>>()?, 0)?.to_vec1::<f32>()?;
        Ok(squares.into_iter().map(f64::from).sum::<f64>().sqrt())
    }

    /// Scaled down so that their norm, here given, is `max_norm` at most.
    pub fn clipped(self, norm: f64, max_norm: f64) -> Result<Self> {
        let factor = max_norm / (norm + EPS);
        if factor >= 1.0 {
            return Ok(self);
        }
        let scaled = self.tensors.iter().map(|gradient| gradient * factor);
        Ok(Self { tensors: scaled.collect::<Result<_>>()? })
    }
}

/// Why parameters may have no gradient.
pub(super) fn causes() -> String {
    format!(
        "Freeze them with nn::set_trainable if the loss does not depend on them; else an operation lost their gradient: \
         {ENDS_THE_GRAPH}"
    )
}

/// The place of the first tensor with a value that is not finite.
pub(super) fn first_not_finite<'a>(
    tensors: impl Iterator<Item = &'a Tensor>,
) -> Result<Option<usize>> {
    // 0 times a finite number is 0; times an infinity or a NaN it is NaN.
    let zeros =
        tensors.map(|tensor| (tensor * 0.0)?.flatten_all()?.sum_all()?.to_dtype(DType::F32));
    let zeros = Tensor::stack(&zeros.collect::<Result<Vec<_>>>()?, 0)?.to_vec1::<f32>()?;
    Ok(zeros.iter().position(|zero| zero.is_nan()))
}
