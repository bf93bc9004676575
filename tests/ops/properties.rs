//! The operations on random shapes, strides and dtypes, against the f64 reference and the composed graph.
//!
//! `PROPTEST_CASES=2000 cargo test --release --test ops properties` tries more.

use crate::common::cases::{self, disguises, Attention, LoraLinear, LoraQkv, MultiHead, Op};
use crate::common::property;
use crate::common::{error, gradients, nudged, random, tensor_error, values, TIMES_ROUNDING};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::ops::Activation;
use candle_sam_lora::philox::Dropout;
use proptest::prelude::*;

/// As in `tests/ops/reference.rs`, on shapes that are chosen there: values, and gradients.
const F32_TOLERANCE: f64 = 3e-6;
const F32_GRADIENT_TOLERANCE: f64 = 1e-5;

fn dropout() -> impl Strategy<Value = Option<Dropout>> {
    prop::option::of((0.0..0.9, any::<u64>(), any::<u32>()))
        .prop_map(|drawn| drawn.map(|(p, seed, stream)| Dropout { p, seed, stream }))
}

fn op() -> impl Strategy<Value = Op<'static>> {
    let activation =
        prop::sample::select(vec![Activation::Identity, Activation::Gelu, Activation::Relu]);
    prop_oneof![
        (1usize..40, 8usize..70).prop_map(|(rows, width)| cases::layer_norm(&[rows, width])),
        ((1usize..80, 1usize..50, 1usize..50), 1usize..20, activation, dropout()).prop_map(
            |((rows, in_dim, out_dim), rank, activation, dropout)| {
                LoraLinear { rows, in_dim, out_dim, rank, activation, dropout }.op()
            }
        ),
        (1usize..60, 1usize..30, (1usize..9, 1usize..9))
            .prop_map(|(rows, dim, (rank_q, rank_v))| LoraQkv { rows, dim, rank_q, rank_v }.op()),
        (
            (1usize..3, 1usize..12, 1usize..12, 1usize..4, 1usize..20),
            prop::option::of(1usize..9),
            // A table of one row adds the same to every score: its gradient is zero, and all error.
            prop::option::of((2usize..30, 2usize..30)),
            dropout(),
        )
            .prop_map(|((batch, h, w, heads, dim), window, tables, dropout)| {
                let side = |length: usize| 2 * window.unwrap_or(length) - 1;
                let tables = tables.unwrap_or((side(h), side(w)));
                Attention { batch, grid: (h, w), heads, dim, window, tables, dropout }.op()
            }),
        ((1usize..4, any::<[bool; 2]>()), 1usize..120, 1usize..300, 1usize..4, 1usize..40)
            .prop_map(|((batch, shared), queries, keys, heads, dim)| {
                let [q, kv] = shared.map(|shared| if shared { 1 } else { batch });
                MultiHead { batch: (q, kv), queries, keys, heads, dim }.op()
            }),
    ]
}

/// The same inputs behind strides and offsets chosen by `choice`.
fn disguised(op: &Op, choice: u32) -> Result<Vec<Tensor>> {
    let one = |(i, input): (usize, &Tensor)| {
        let mut ways = disguises(input)?;
        ways.push(input.clone());
        Ok(ways.swap_remove((choice >> (2 * i)) as usize % ways.len()))
    };
    op.inputs.iter().enumerate().map(one).collect()
}

proptest! {
    #![proptest_config(property::config(120))]

    #[test]
    fn values_are_the_references_and_gradients_the_composed_graphs(op in op(), choice in any::<u32>()) {
        let name = &op.name;
        let inputs = disguised(&op, choice).unwrap();
        let expected = (op.reference)(&op.inputs.iter().map(values).collect::<Vec<_>>());
        let out = (op.fused)(&inputs).unwrap();
        let off = error(&values(&out), &expected);
        let nudged = nudged(&op.inputs);
        let rounding = error(&(op.reference)(&nudged.iter().map(values).collect::<Vec<_>>()), &expected);
        let bound = F32_TOLERANCE.max(TIMES_ROUNDING * rounding);
        prop_assert!(off <= bound, "{name}: {off:e} > {bound:e}");
        let grad_out = random(78, out.shape());
        let (again, fused) = gradients(&inputs, &grad_out, &op.fused).unwrap();
        prop_assert_eq!(values(&again), values(&out), "{}", name);
        let (_, composed) = gradients(&inputs, &grad_out, &op.composed).unwrap();
        let (_, rounded) = gradients(&nudged, &grad_out, &op.composed).unwrap();
        // A table of one row shifts all scores alike: its gradient cancels, and what is left is rounding.
        let size = |t: &Tensor| values(t).into_iter().fold(0f64, |m, x| m.max(x.abs()));
        let largest = composed.iter().map(size).fold(0f64, f64::max);
        let all = fused.iter().zip(&composed).zip(&rounded);
        for (index, ((fused, composed), rounded)) in all.enumerate() {
            let off = tensor_error(fused, composed);
            let cancels = size(fused).max(size(composed)) <= 1e-5 * largest;
            let bound = F32_GRADIENT_TOLERANCE.max(TIMES_ROUNDING * tensor_error(rounded, composed));
            prop_assert!(off <= bound || cancels, "{name}: gradient {index}: {off:e} > {bound:e}");
        }
    }

    /// As `half_precision_is_no_worse_than_twice_the_eager_error` in `tests/ops/reference.rs`.
    #[test]
    fn half_precision_is_no_worse_than_twice_the_eager_error(op in op(), choice in any::<u32>(), bf16 in any::<bool>()) {
        let (dtype, epsilon) = if bf16 { (DType::BF16, 1.0 / 128.0) } else { (DType::F16, 1.0 / 1024.0) };
        let inputs: Vec<Tensor> = op.inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let expected = (op.reference)(&inputs.iter().map(values).collect::<Vec<_>>());
        let rounded = Op { inputs, ..op };
        let out = (rounded.fused)(&disguised(&rounded, choice).unwrap()).unwrap();
        prop_assert_eq!(out.dtype(), dtype);
        let fused = error(&values(&out), &expected);
        let eager = error(&values(&(rounded.composed)(&rounded.inputs).unwrap()), &expected);
        prop_assert!(fused <= (2.0 * eager).max(0.5 * epsilon), "{}: {fused:e}, eager {eager:e}", rounded.name);
    }
}
