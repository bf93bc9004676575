//! The operations: free functions over tensors, each with a true gradient for every differentiable input.
//!
//! | op | computes |
//! |---|---|
//! | [`layer_norm`] | LayerNorm over the last dimension |
//! | [`lora_linear`] | `act(x W^T + b + scaling (drop(x) A^T B^T + lora_bias)) + residual` |
//! | [`lora_qkv`] | q, k and v projections side by side, LoRA on any of them |
//! | [`rel_pos_attention`] | attention with decomposed relative positions, global or windowed |
//! | [`multi_head_attention`] | attention between two sets of tokens, heads last |
//! | [`attention_block`], [`mlp_block`] | the two residual branches of an encoder layer |
//! | [`attention_layer`] | an encoder layer's attention alone, q, k and v to proj |
//! | [`dora_linear`] | a linear with a DoRA adapter |
//! | [`dropout`] | counter-based dropout |
//! | [`scale_shift`], [`broadcast_add`], [`repeat`] | a small tensor applied to all of a large one |
//! | [`matmul`] | candle's, summed in f32 |
//!
//! All take f32, f16 and bf16 tensors of any strides and offset, accumulate in f32 and round once at the output. Where
//! the fused code does not apply, the same operation runs as a graph of candle's own ones: slower, larger, equally
//! differentiable. The feature `testing` shows it as `testing::composed`.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_sam_lora::ops::{lora_linear, Activation, Dropout, Lora, Projection};
//!
//! # fn main() -> candle_core::Result<()> {
//! let normal = |dims: (usize, usize)| Tensor::randn(0f32, 1f32, dims, &Device::Cpu);
//! let (x, weight) = (normal((4, 8))?, normal((6, 8))?);
//! let (a, b) = (Var::from_tensor(&normal((2, 8))?)?, Var::from_tensor(&normal((6, 2))?)?);
//! // Seed, stream and place say whether an element is dropped: equal on every device.
//! let dropout = Some(Dropout { p: 0.1, seed: 1, stream: 0 });
//! let lora = Some(Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout });
//! let projection = Projection { weight: &weight, scales: None, bias: None, lora };
//! let y = lora_linear(&x, &projection, Activation::Gelu, None)?;
//! assert_eq!(y.dims(), [4, 6]);
//! assert!(y.sum_all()?.backward()?.get(&a).is_some());
//! # Ok(())
//! # }
//! ```

mod absorbed;
mod activation;
mod arguments;
mod broadcast;
mod chain;
mod check;
mod collector;
pub(crate) mod composed;
mod computed;
mod conv_columns;
mod cpu;
mod custom;
mod dora;
mod dropout;
mod fallback;
mod fused;
#[cfg(feature = "cuda")]
mod gpu;
pub(crate) mod image_side;
mod layer_norm;
pub(crate) mod mask_loss;
mod multi_head;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod native;
pub(crate) mod optimizer;
mod params;
mod product;
mod projection;
mod rel_pos_attention;
mod resize;

pub use crate::philox::{stream_of, Dropout};
pub use crate::problem::Activation;
pub use arguments::{Lora, Norm, Projection, RelPosAttention};
pub use broadcast::{broadcast_add, repeat, scale_shift};
pub(crate) use chain::joined;
pub use chain::{attention_block, attention_layer, mlp_block};
pub(crate) use collector::{without_collector, Collector};
pub(crate) use computed::with_backward;
pub(crate) use conv_columns::conv_columns;
pub use dora::{dora_linear, dora_weight_norm};
pub use dropout::dropout;
pub use fused::{lora_linear, lora_qkv, rel_pos_attention};
#[cfg(feature = "cuda")]
#[doc(hidden)] // its place is `cuda`
pub use gpu::self_test_report;
#[cfg(feature = "cuda")]
pub(crate) use gpu::{adamw, recorded};
pub use layer_norm::layer_norm;
pub use multi_head::multi_head_attention;
pub(crate) use params::{concat, pack};
pub use product::matmul;
pub(crate) use resize::resize_cubic;
pub use resize::{
    bicubic_resize_matrix, linear_resize_matrix, resize_bicubic, resize_bilinear, resize_linear,
};

/// Whether this thread records a step for a CUDA graph, or warms up for that. The graph may read no tensor that a cache
/// frees.
pub(crate) fn prepares_graph() -> bool {
    #[cfg(feature = "cuda")]
    return crate::driver::prepares_graph();
    #[cfg(not(feature = "cuda"))]
    false
}

/// The gradients of a custom operation's three inputs.
type Gradients =
    (Option<candle_core::Tensor>, Option<candle_core::Tensor>, Option<candle_core::Tensor>);
