//! Bad input to the operations: a message that names the operation, what it expected and what it got; never a panic.

use crate::common::property;
use crate::common::random;
use candle_core::{DType, Device, Result, Tensor};
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::composed;
use proptest::prelude::*;

#[track_caller]
fn fails(result: Result<Tensor>, parts: &[&str]) {
    let message = match result {
        Ok(t) => panic!("expected an error with {parts:?}, got a tensor {:?}", t.dims()),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "{message:?} does not name {part:?}");
    }
}

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

fn attention(heads: usize) -> RelPosAttention<'static> {
    RelPosAttention {
        num_heads: heads,
        softmax_scale: 1.0,
        rel_pos: None,
        window: None,
        pad: None,
        dropout: None,
    }
}

#[test]
fn layer_norm() {
    let (x, w) = (zeros(&[2, 4]), zeros(&[4]));
    let op = "layer-norm";
    fails(ops::layer_norm(&x, &zeros(&[3]), &w, 1e-6), &[op, "weight", "[4]", "[3]"]);
    fails(ops::layer_norm(&x, &w, &zeros(&[4, 1]), 1e-6), &[op, "bias", "[4]", "[4, 1]"]);
    fails(ops::layer_norm(&zeros(&[2, 0]), &w, &w, 1e-6), &[op, "empty", "[2, 0]"]);
    fails(ops::layer_norm(&zeros(&[]), &w, &w, 1e-6), &[op, "empty"]);
    for eps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        fails(ops::layer_norm(&x, &w, &w, eps), &[op, "eps"]);
    }
    let half = w.to_dtype(DType::F16).unwrap();
    fails(ops::layer_norm(&x, &half, &w, 1e-6), &[op, "F16", "F32"]);
    let integers = x.to_dtype(DType::U32).unwrap();
    fails(ops::layer_norm(&integers, &w, &w, 1e-6), &[op, "U32"]);
    let double = x.to_dtype(DType::F64).unwrap();
    fails(ops::layer_norm(&double, &w, &w, 1e-6), &[op, "F64"]);
}

#[test]
fn broadcasts() {
    let x = zeros(&[2, 4]);
    for small in [&[3][..], &[4, 1], &[2, 2, 4]] {
        let small = zeros(small);
        let shape = format!("{:?}", small.dims());
        let parts = ["does not broadcast", "[2, 4]", shape.as_str()];
        fails(ops::scale_shift(&x, Some(&small), None), &parts);
        fails(ops::broadcast_add(&x, &small), &parts);
        fails(ops::repeat(&small, (2, 4)), &parts);
    }
    fails(ops::broadcast_add(&zeros(&[0, 4]), &zeros(&[4])), &["scale-shift", "empty", "[0, 4]"]);
    fails(ops::repeat(&zeros(&[4]), (0, 4)), &["repeat", "empty", "[0, 4]"]);
    let double = x.to_dtype(DType::F64).unwrap();
    fails(ops::broadcast_add(&x, &double), &["scale-shift", "shift", "F64"]);
}

#[test]
fn lora_linear() {
    let op = "lora-linear";
    let (x, weight, bias) = (zeros(&[3, 4]), zeros(&[5, 4]), zeros(&[5]));
    let (a, b) = (zeros(&[2, 4]), zeros(&[5, 2]));
    let base = Projection { weight: &weight, scales: None, bias: Some(&bias), lora: None };
    let run = |p: &Projection| ops::lora_linear(&x, p, Activation::Identity, None);
    let narrow = zeros(&[5, 3]);
    fails(run(&Projection { weight: &narrow, ..base }), &[op, "[out, 4]", "[5, 3]"]);
    fails(run(&Projection { weight: &bias, ..base }), &[op, "weight", "[5]"]);
    fails(run(&Projection { bias: Some(&weight), ..base }), &[op, "bias", "[5]", "[5, 4]"]);
    let lora = Lora { a: &a, b: &b, b_bias: None, scaling: 1.0, dropout: None };
    let with = |lora| run(&Projection { lora: Some(lora), ..base });
    let (empty, wide, deep) = (zeros(&[0, 4]), zeros(&[2, 5]), zeros(&[5, 3]));
    fails(with(Lora { a: &empty, ..lora }), &[op, "lora A", "rank >= 1", "[0, 4]"]);
    fails(with(Lora { a: &wide, ..lora }), &[op, "lora A", "[2, 4]", "[2, 5]"]);
    fails(with(Lora { b: &deep, ..lora }), &[op, "lora B", "[5, 2]", "[5, 3]"]);
    fails(with(Lora { b_bias: Some(&a), ..lora }), &[op, "lora bias", "[5]", "[2, 4]"]);
    for scaling in [f64::NAN, f64::INFINITY, 1e39] {
        fails(with(Lora { scaling, ..lora }), &[op, "scaling"]);
    }
    for p in [-0.1, 1.0, 0.999_999_9, 2.0, f64::NAN] {
        let dropout = Some(Dropout { p, seed: 0, stream: 0 });
        fails(with(Lora { dropout, ..lora }), &[op, "dropout"]);
    }
    let residual = zeros(&[3, 4]);
    let got = ops::lora_linear(&x, &base, Activation::Identity, Some(&residual));
    fails(got, &[op, "residual", "[3, 5]", "[3, 4]"]);
}

#[test]
fn lora_qkv() {
    let (x, weight, wide) = (zeros(&[3, 4]), zeros(&[4, 4]), zeros(&[8, 4]));
    let p = Projection { weight: &weight, scales: None, bias: None, lora: None };
    let other = Projection { weight: &wide, ..p };
    fails(ops::lora_qkv(&x, &[p, other, p]), &["lora-qkv", "equal", "4, 8"]);
}

/// As one operation, and one after the other where a weight is trained.
#[test]
fn attention_layer() {
    let (x, config) = (zeros(&[1, 2, 2, 4]), attention(1));
    let (narrow, weight, wide) = (zeros(&[2, 4]), zeros(&[4, 4]), zeros(&[6, 4]));
    let trained = candle_core::Var::from_tensor(&weight).unwrap();
    fn projection(weight: &Tensor) -> Projection<'_> {
        Projection { weight, scales: None, bias: None, lora: None }
    }
    for proj in [&weight, trained.as_tensor()] {
        let run = |weights: &[&Tensor]| {
            let qkv: Vec<_> = weights.iter().map(|weight| projection(weight)).collect();
            ops::attention_layer(&x, &qkv, &config, &projection(proj))
        };
        assert_eq!(run(&[&weight; 3]).unwrap().dims(), x.dims());
        // Together they are as wide as three of four would be.
        fails(run(&[&narrow, &weight, &wide]), &["lora-qkv", "equal", "2, 4 and 6"]);
        fails(run(&[]), &["layer-chain", "one projection or three", "got 0"]);
        fails(run(&[&wide, &wide]), &["layer-chain", "one projection or three", "got 2"]);
        fails(run(&[&weight]), &["rel-pos-attention", "3 x 1 heads", "got 4"]);
    }
}

#[test]
fn multi_head_attention() {
    let op = "multi-head-attention";
    let (q, kv) = (zeros(&[2, 3, 8]), zeros(&[2, 5, 8]));
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, heads| {
        ops::multi_head_attention(q, [k, v], heads, 1.0)
    };
    for heads in [0, 3] {
        fails(run(&q, &kv, &kv, heads), &[op, "8 channels", &format!("{heads} heads")]);
    }
    fails(run(&zeros(&[3, 8]), &kv, &kv, 2), &[op, "q", "[B, tokens, C]", "[3, 8]"]);
    fails(run(&zeros(&[2, 0, 8]), &kv, &kv, 2), &[op, "q", "empty"]);
    fails(run(&q, &zeros(&[2, 5, 6]), &kv, 2), &[op, "k", "[2, 5, 8]", "[2, 5, 6]"]);
    fails(run(&q, &kv, &zeros(&[2, 4, 8]), 2), &[op, "v", "[2, 5, 8]", "[2, 4, 8]"]);
    let three = zeros(&[3, 5, 8]);
    fails(run(&q, &three, &three, 2), &[op, "2 entries", "got 3"]);
    let half = kv.to_dtype(DType::F16).unwrap();
    fails(run(&q, &half, &kv, 2), &[op, "k", "F16", "F32"]);
    let scaled = ops::multi_head_attention(&q, [&kv, &kv], 2, f64::NAN);
    fails(scaled, &[op, "softmax_scale", "NaN"]);
}

#[test]
fn rel_pos_attention() {
    let op = "rel-pos-attention";
    let qkv = zeros(&[1, 3, 4, 24]);
    let config = attention(2);
    let run = |config: &RelPosAttention| ops::rel_pos_attention(&qkv, config);
    fails(ops::rel_pos_attention(&zeros(&[3, 4, 24]), &config), &[op, "[B, H, W, 3C]"]);
    fails(ops::rel_pos_attention(&zeros(&[1, 0, 4, 24]), &config), &[op, "empty"]);
    for heads in [0, 3, 5, 100] {
        fails(run(&attention(heads)), &[op, "heads", "24"]);
    }
    fails(ops::rel_pos_attention(&zeros(&[1, 3, 4, 25]), &config), &[op, "25"]);
    fails(run(&RelPosAttention { window: Some(0), ..config }), &[op, "window"]);
    let (table, wrong) = (zeros(&[5, 4]), zeros(&[5, 3]));
    let tables = RelPosAttention { rel_pos: Some((&table, &wrong)), ..config };
    fails(run(&tables), &[op, "rel_pos_w", "[length, 4]", "[5, 3]"]);
    let empty = zeros(&[0, 4]);
    fails(run(&RelPosAttention { rel_pos: Some((&empty, &table)), ..config }), &[op, "[0, 4]"]);
    fails(run(&RelPosAttention { pad: Some(&table), ..config }), &[op, "pad", "[24]"]);
    for softmax_scale in [f64::NAN, -1e39] {
        let scale = RelPosAttention { softmax_scale, ..config };
        fails(run(&scale), &[op, "softmax_scale"]);
    }
    let huge = RelPosAttention { window: Some(usize::MAX / 2), ..config };
    fails(run(&huge), &[op, "window"]);

    // The composed one is public, too.
    let run = |config| composed::rel_pos_attention(&qkv, &config).map(|(out, _)| out);
    fails(run(attention(0)), &[op, "heads", "24"]);
    fails(run(RelPosAttention { window: Some(0), ..config }), &[op, "window"]);
    fails(composed::partition(&qkv, 0, None), &["partition", "positive"]);
    fails(composed::unpartition(&qkv, 0, (1, 3, 4)), &["unpartition", "positive"]);
}

#[test]
fn a_frozen_weight_behind_a_graph_is_not_cut_off() -> Result<()> {
    // A weight computed from a variable must receive its gradient, whatever path that takes.
    let scale = candle_core::Var::new(2f32, &Device::Cpu)?;
    let weight = random(1, (5, 4)).broadcast_mul(&scale)?;
    let projection = Projection { weight: &weight, scales: None, bias: None, lora: None };
    let y = ops::lora_linear(&random(2, (3, 4)), &projection, Activation::Identity, None)?;
    let grads = y.sqr()?.sum_all()?.backward()?;
    let grad = grads.get(&scale).expect("the scale has a gradient").to_scalar::<f32>()?;
    let expected = y.sqr()?.sum_all()?.to_scalar::<f32>()?;
    assert!((grad / expected - 1.0).abs() < 1e-5, "{grad} {expected}");
    Ok(())
}

/// A resized integer would be cut off.
#[test]
fn resizes_of_integers() {
    for dtype in [DType::U8, DType::I64] {
        let (table, grids) = (zeros(&[3, 4]), zeros(&[1, 3, 3, 4]));
        let (table, grids) = (table.to_dtype(dtype).unwrap(), grids.to_dtype(dtype).unwrap());
        let got = format!("{dtype:?}");
        fails(ops::resize_linear(&table, 5), &["resize", "table", &got]);
        fails(ops::resize_bilinear(&grids, [5, 5]), &["resize", "grids", &got]);
        fails(ops::resize_bicubic(&grids, 5), &["resize", "grids", &got]);
    }
}

proptest! {
    #![proptest_config(property::config(300))]

    /// Any shapes: a finite result of the right shape, or an error; never a panic.
    #[test]
    fn any_shapes(
        x in prop::collection::vec(0usize..6, 0..5),
        others in prop::collection::vec(prop::collection::vec(0usize..7, 0..4), 5),
        heads in 0usize..5,
        window in prop::option::of(0usize..8),
        scale in prop::num::f64::ANY,
        p in prop::num::f64::ANY,
    ) {
        let x = random(1, x);
        let others: Vec<Tensor> = others.into_iter().map(|dims| random(2, dims)).collect();
        if let Ok(y) = ops::layer_norm(&x, &others[0], &others[1], 1e-6) {
            prop_assert_eq!(y.dims(), x.dims());
        }
        let factor = candle_core::Var::from_tensor(&others[0]).unwrap();
        if let Ok(y) = ops::scale_shift(&x, Some(&factor), Some(&others[1])) {
            prop_assert_eq!(y.dims(), x.dims());
            let gradients = y.backward().unwrap();
            prop_assert_eq!(gradients.get(&factor).map(Tensor::dims), Some(factor.dims()));
        }
        let dropout = Some(Dropout { p, seed: 1, stream: 2 });
        let lora = Lora {
            a: &others[1],
            b: &others[2],
            b_bias: Some(&others[3]),
            scaling: scale,
            dropout,
        };
        let projection = Projection { weight: &others[0], scales: None, bias: Some(&others[3]), lora: Some(lora) };
        let residual = Some(&others[4]);
        let _ = ops::lora_linear(&x, &projection, Activation::Gelu, residual);
        let plain = Projection { weight: &others[0], scales: None, bias: None, lora: None };
        if let Ok(y) = ops::lora_linear(&x, &plain, Activation::Identity, None) {
            prop_assert_eq!(y.dims().last(), others[0].dims().first());
        }
        let _ = ops::lora_qkv(&x, &[plain, projection, plain]);
        let _ = ops::dora_linear(&x, &projection, &others[4]);
        let config = RelPosAttention {
            num_heads: heads,
            softmax_scale: scale,
            rel_pos: Some((&others[0], &others[1])),
            window,
            pad: Some(&others[2]),
            dropout,
        };
        if let Ok(y) = ops::rel_pos_attention(&x, &config) {
            prop_assert_eq!(&y.dims()[..3], &x.dims()[..3]);
        }
        let bare = RelPosAttention { rel_pos: None, pad: None, dropout: None, ..config };
        let _ = ops::rel_pos_attention(&x, &bare);
    }
}
