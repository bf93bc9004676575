//! Parameters as one input: candle differentiates three inputs of an operation, so biases, adapters and tables travel
//! together in one flat f32 tensor. A frozen parameter needs no gradient, and a GPU's kernels can read it in place.

#[cfg(any(test, feature = "cuda"))]
use super::custom::operand;
use candle_core::{DType, Device, Result, Tensor};

/// The elements of all tensors, in f32 and in order; one zero if there are none, since candle has no empty storage. The
/// graph of candle takes the gradient apart again.
pub(crate) fn pack<'a>(
    tensors: impl IntoIterator<Item = &'a Tensor>,
    device: &Device,
) -> Result<Tensor> {
    let flat = tensors.into_iter().map(|tensor| tensor.flatten_all()?.to_dtype(DType::F32));
    match flat.collect::<Result<Vec<_>>>()?.as_slice() {
        [] => Tensor::zeros(1, DType::F32, device),
        flat => Tensor::cat(flat, 0),
    }
}

/// The vectors one behind the other: one launch on a GPU, where none wants a gradient.
///
/// # Errors
/// As [`Tensor::cat`].
pub(crate) fn concat(vectors: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = super::gpu::concat::concat(vectors)? {
        return Ok(out);
    }
    Tensor::cat(vectors, 0)
}

/// The parameters for kernels that read each in place, in the dtype that `read_as` names. None if one wants a gradient:
/// only an input gets one.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn in_place(
    parameters: &[Tensor],
    read_as: impl Fn(&Tensor) -> DType,
) -> Result<Option<Vec<Tensor>>> {
    if parameters.iter().any(Tensor::track_op) {
        return Ok(None);
    }
    parameters
        .iter()
        .map(|tensor| operand(&tensor.to_dtype(read_as(tensor))?))
        .collect::<Result<_>>()
        .map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn only_frozen_parameters_are_read_in_place() -> Result<()> {
        let zeros = |dtype| Tensor::zeros((3, 2), dtype, &Device::Cpu);
        let (half, full) = (zeros(DType::BF16)?, zeros(DType::F32)?);
        let read = |parameters: &[Tensor]| in_place(parameters, |_| DType::F32);

        let frozen = read(&[half.clone(), full.clone()])?.unwrap_or_default();
        assert_eq!(frozen.iter().map(Tensor::dtype).collect::<Vec<_>>(), [DType::F32; 2]);
        assert_eq!(frozen[1].id(), full.id());

        let as_they_are = in_place(&[half.clone(), full.clone()], Tensor::dtype)?;
        let ids = as_they_are.map(|tensors| tensors.iter().map(Tensor::id).collect::<Vec<_>>());
        assert_eq!(ids, Some(vec![half.id(), full.id()]));

        let trained = Var::from_tensor(&full)?.into_inner();
        assert!(read(&[half, trained])?.is_none());
        Ok(())
    }

    #[test]
    fn packed_parameters_get_their_gradients() -> Result<()> {
        let of = |values: &[f32]| Var::new(values, &Device::Cpu);
        let (a, b) = (of(&[1.0, 2.0])?, of(&[3.0])?);
        let packed = pack([a.as_tensor(), b.as_tensor()], &Device::Cpu)?;
        let gradients = packed.sqr()?.sum_all()?.backward()?;
        let gradient = |of: &Tensor| gradients.get(of).map(Tensor::to_vec1::<f32>).transpose();
        assert_eq!((gradient(&a)?, gradient(&b)?), (Some(vec![2.0, 4.0]), Some(vec![6.0])));
        Ok(())
    }
}
