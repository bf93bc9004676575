//! Multi-head attention between two sets of tokens, heads last.
//!
//! ```text
//! out_n = sum_m softmax_m(softmax_scale q_n . k_m) v_m      for each head
//! ```
//! On the CPU and by the kernels of a GPU nothing of size queries x keys is allocated, and q, k and v are read in
//! place. Heads of more than 32 channels are the composed graph's on a GPU.

use super::computed::node;
use super::custom::{from_f32, tensor_like, with_f32};
use super::{check, composed, fallback};
#[cfg(feature = "cuda")]
use super::{custom::operand, gpu::multi_head::MultiHead};
use crate::cpu::multi_head::{backward, forward, Inputs};
#[cfg(feature = "cuda")]
use crate::launch::{self, Gpu};
use crate::problem::MultiHeadProblem;
use candle_core::{bail, DType, Device, Result, Storage, Tensor};

const OP: &str = MultiHeadProblem::OP;

/// Attention of `q [B, N, heads d]` to `k` and `v [B, M, heads d]` -> `[B, N, heads d]`, with gradients for all three.
/// An entry that all of the batch share comes once: `q [1, ..]`, or `k` and `v [1, ..]`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::ops::multi_head_attention;
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let q = Tensor::ones((1, 3, 2), DType::F32, &Device::Cpu)?; // three tokens, two heads of one channel
/// let k = Tensor::zeros((1, 2, 2), DType::F32, &Device::Cpu)?;
/// let v = Tensor::new(&[[[0f32, 1.0], [2.0, 3.0]]], &Device::Cpu)?;
/// let mean = multi_head_attention(&q, [&k, &v], 2, 1.0)?; // equal keys: the mean of the values
/// assert_eq!(mean.to_vec3::<f32>()?, [[[1.0, 2.0]; 3]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - a tensor is empty, or none of f32, f16 and bf16;
/// - shapes do not fit, or `num_heads` does not divide the channels;
/// - dtypes or devices are mixed;
/// - `softmax_scale` is not finite.
pub fn multi_head_attention(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    num_heads: usize,
    softmax_scale: f64,
) -> Result<Tensor> {
    let p = problem(q, [k, v], num_heads, softmax_scale)?;
    match q.device() {
        Device::Cpu => return on_cpu(p, [q, k, v]),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let covers = |gpu: &Gpu| launch::multi_head::covers(&p, q.dtype(), gpu).then_some(None);
            if let Some(gpu) = super::gpu::choice::gpu(device, q.dtype(), covers)? {
                return on_gpu(MultiHead { problem: p, gpu }, [q, k, v]);
            }
        }
        _ => {}
    }
    fallback::tell(OP, q, fallback::NO_KERNEL);
    composed::multi_head_attention([q, k, v], num_heads, softmax_scale)
}

#[cfg(feature = "cuda")]
fn on_gpu(attention: MultiHead, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let (q, k, v) = (operand(q)?, operand(k)?, operand(v)?);
    let inputs = (&q, Some(&k), Some(&v));
    let (out, shape, saved) = attention.forward([&q, &k, &v])?;
    let out = (Storage::Cuda(out), shape);
    node(OP, inputs, out, move |inputs, value, grad| {
        attention.backward(inputs, (value, &saved), grad)
    })
}

fn on_cpu(p: MultiHeadProblem, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let (out, normalizers) = with_inputs([q, k, v], |inputs| Ok(forward(&p, inputs)))?;
    let out = out.into_vec();
    // The backward's sums cancel, so an output that was rounded to 16 bits is too coarse for them.
    let exact = q.dtype() != DType::F32 && [q, k, v].iter().any(|input| input.track_op());
    let exact = exact.then(|| Tensor::from_slice(&out, out.len(), q.device())).transpose()?;
    let value = Storage::Cpu(from_f32(OP, out, q.dtype())?);
    let shape = (p.batch, p.queries, p.channels()).into();
    node(OP, (q, Some(k), Some(v)), (value, shape), move |inputs, value, grad| {
        let grads = with_inputs(inputs, |inputs| {
            with_f32(OP, exact.as_ref().unwrap_or(value), |value| {
                with_f32(OP, grad, |grad| Ok(backward(&p, inputs, (&value, &normalizers), &grad)))
            })
        })?;
        let [q, k, v] = inputs;
        let wanted = |values: Vec<f32>, like: &Tensor| {
            like.track_op().then(|| tensor_like(values, like)).transpose()
        };
        Ok((
            wanted(grads.q.into_vec(), q)?,
            wanted(grads.k.into_vec(), k)?,
            wanted(grads.v.into_vec(), v)?,
        ))
    })
}

fn with_inputs<R>([q, k, v]: [&Tensor; 3], f: impl FnOnce(&Inputs<'_>) -> Result<R>) -> Result<R> {
    with_f32(OP, q, |q| {
        with_f32(OP, k, |k| with_f32(OP, v, |v| f(&Inputs { q: &q, k: &k, v: &v })))
    })
}

/// Checks everything and describes the problem.
fn problem(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    num_heads: usize,
    softmax_scale: f64,
) -> Result<MultiHeadProblem> {
    check::float(OP, "q", q)?;
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        check::not_empty(OP, name, tensor)?;
        check::same_kind(OP, name, tensor, q)?;
        if tensor.rank() != 3 {
            bail!("{OP}: {name} must have shape [B, tokens, C], got {:?}", tensor.dims())
        }
    }
    let (q_batch, queries, channels) = q.dims3()?;
    let (kv_batch, keys, _) = k.dims3()?;
    if num_heads == 0 || channels % num_heads != 0 {
        bail!("{OP}: the {channels} channels of q are not {num_heads} heads of one size")
    }
    check::shape(OP, "k", k, &[kv_batch, keys, channels])?;
    check::shape(OP, "v", v, &[kv_batch, keys, channels])?;
    let batch = q_batch.max(kv_batch);
    if [q_batch, kv_batch].iter().any(|&entries| entries != batch && entries != 1) {
        bail!("{OP}: k must have {q_batch} entries, or one of q and k a single one, got {kv_batch}")
    }
    check::finite(OP, "softmax_scale", softmax_scale)?;
    Ok(MultiHeadProblem {
        batch,
        q_batch,
        kv_batch,
        queries,
        keys,
        num_heads,
        head_dim: channels / num_heads,
        softmax_scale: softmax_scale as f32,
    })
}
