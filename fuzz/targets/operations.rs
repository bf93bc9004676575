//! The operations on tensors of any shape, stride, dtype and value: an error or a result of the right shape, forward
//! and backward. Where values are tame, it is the result of the same operation composed of candle's own.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use candle_core::{DType, Device, Tensor, Var};
use candle_sam_lora::ops::{self, Activation, Dropout, Lora, Projection, RelPosAttention};
use candle_sam_lora::testing::composed;

type Drawn<T> = arbitrary::Result<T>;

/// The operation, and the sizes from which the shapes of its inputs follow when they are right.
#[derive(Arbitrary, Debug)]
struct Case {
    operation: u8,
    sizes: [u8; 6],
    activation: u8,
    scaling: f64,
    eps: f64,
    dropout: Option<(f64, u64, u32)>,
    window: Option<u8>,
    optional: [bool; 5],
}

/// A tensor of this shape, or, one time in eight, of any other; behind any strides.
fn tensor(u: &mut Unstructured, dims: &[usize], dtype: DType) -> Drawn<Tensor> {
    let mut dims = dims.to_vec();
    if u.ratio(1, 8)? {
        dims = (0..u.int_in_range(0..=5)?).map(|_| u.int_in_range(0..=9)).collect::<Drawn<_>>()?;
    }
    let dtypes = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8, DType::I64];
    let dtype = if u.ratio(1, 16)? { *u.choose(&dtypes)? } else { dtype };
    let (scale, offset): (i8, i8) = (u.arbitrary()?, u.arbitrary()?);
    let wild = u.ratio(1, 16)?;
    let count: usize = dims.iter().product();
    let values = (0..count).map(|i| match wild {
        true => u.arbitrary(),
        false => {
            Ok((f32::from(offset) + i as f32 * f32::from(scale)).sin() * (i as f32 * 0.37).cos())
        }
    });
    let values = values.collect::<Drawn<Vec<f32>>>()?;
    let plain = Tensor::from_vec(values, dims.clone(), &Device::Cpu).unwrap();
    let plain = plain.to_dtype(dtype).unwrap();
    let rank = dims.len();
    Ok(match u.int_in_range(0..=5)? {
        1 if rank >= 2 => plain
            .transpose(rank - 2, rank - 1)
            .unwrap()
            .contiguous()
            .unwrap()
            .transpose(rank - 2, rank - 1)
            .unwrap(),
        2 if rank >= 1 && dims[0] > 0 => {
            Tensor::cat(&[&plain, &plain, &plain], 0).unwrap().narrow(0, dims[0], dims[0]).unwrap()
        }
        3 if rank >= 1 && count > 0 => {
            let pairs = Tensor::stack(&[&plain, &plain], rank).unwrap();
            pairs.narrow(rank, 1, 1).unwrap().squeeze(rank).unwrap()
        }
        4 if rank >= 1 && dims[0] > 0 => plain.narrow(0, 0, 1).unwrap().broadcast_as(dims).unwrap(),
        _ => plain,
    })
}

/// Makes some inputs variables, runs the operation and its backward.
fn run(
    inputs: &[Tensor],
    trained: u8,
    operation: &dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) -> candle_core::Result<(Tensor, Vec<Option<Tensor>>)> {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .enumerate()
        .map(|(i, t)| match trained >> (i % 8) & 1 == 1 && t.dtype().is_float() {
            true => Var::from_tensor(t).unwrap().into_inner(),
            false => t.clone(),
        })
        .collect();
    let y = operation(&inputs)?;
    let grads = y.sum_all().unwrap().backward().expect("a result has a backward");
    // candle's own operations leave gradients of what nobody trains, too.
    let grads = inputs.iter().map(|input| {
        let grad = grads.get(input).filter(|_| input.is_variable()).cloned();
        if let Some(grad) = &grad {
            assert_eq!(grad.dims(), input.dims(), "the gradient has its input's shape");
            assert_eq!(grad.dtype(), input.dtype(), "the gradient has its input's dtype");
        }
        grad
    });
    Ok((y.clone(), grads.collect()))
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// Compares two tensors where both are tame; rounding differs where values do by powers.
fn same(what: &str, ours: &Tensor, theirs: &Tensor) {
    let (ours, theirs) = (values(ours), values(theirs));
    let tame = |v: &[f64]| v.iter().all(|x| x.is_finite() && x.abs() < 1e4);
    if tame(&ours) && tame(&theirs) {
        let largest = theirs.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() < 2e-3 * (1.0 + largest), "{what}: {a} and {b}");
        }
    }
}

fn one(u: &mut Unstructured) -> Drawn<()> {
    let case = Case::arbitrary(u)?;
    let trained: u8 = u.arbitrary()?;
    let dtype = *u.choose(&[DType::F32, DType::F32, DType::F16, DType::BF16])?;
    let [rows, in_dim, out_dim, rank, heads, batch] = case.sizes.map(usize::from);
    let [rows, in_dim, out_dim, rank] = [rows, in_dim, out_dim, rank].map(|size| 1 + size % 9);
    let (heads, batch) = (1 + heads % 3, 1 + batch % 2);
    let activation =
        [Activation::Identity, Activation::Gelu, Activation::Relu][case.activation as usize % 3];
    let dropout =
        case.dropout.map(|(p, seed, stream)| Dropout { p: p.abs().fract(), seed, stream });
    let scaling = if case.scaling.abs() < 1e3 { case.scaling } else { 1.0 };
    let [a, b, c, d, e] = case.optional;
    type Operation<'a> = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Tensor> + 'a>;
    let (shapes, fused, plain): (Vec<Vec<usize>>, Operation, Option<Operation>) = match case
        .operation
        % 6
    {
        0 => (
            vec![vec![batch, rows, in_dim], vec![in_dim], vec![in_dim]],
            Box::new(|t| ops::layer_norm(&t[0], &t[1], &t[2], case.eps)),
            // Where the variance is small beside eps, rounding is all there is to compare.
            (case.eps > 1e-3 && case.eps < 1e3).then(|| {
                Box::new(|t: &[Tensor]| composed::layer_norm(&t[0], &t[1], &t[2], case.eps))
                    as Operation
            }),
        ),
        1 | 2 => {
            fn projection<'t>(
                t: &'t [Tensor],
                o: [bool; 5],
                scaling: f64,
                dropout: Option<Dropout>,
            ) -> Projection<'t> {
                let lora =
                    Lora { a: &t[3], b: &t[4], b_bias: o[1].then_some(&t[5]), scaling, dropout };
                Projection {
                    weight: &t[1],
                    scales: None,
                    bias: o[0].then_some(&t[2]),
                    lora: o[2].then_some(lora),
                }
            }
            let o = [a, b, c, d, e];
            let shapes = vec![
                vec![batch, rows, in_dim],
                vec![out_dim, in_dim],
                vec![out_dim],
                vec![rank, in_dim],
                vec![out_dim, rank],
                vec![out_dim],
                vec![batch, rows, out_dim],
            ];
            if case.operation % 6 == 1 {
                (
                    shapes,
                    Box::new(move |t| {
                        ops::lora_linear(
                            &t[0],
                            &projection(t, o, scaling, dropout),
                            activation,
                            d.then_some(&t[6]),
                        )
                    }),
                    Some(Box::new(move |t| {
                        composed::lora_linear(
                            &t[0],
                            &projection(t, o, scaling, dropout),
                            activation,
                            d.then_some(&t[6]),
                        )
                    })),
                )
            } else {
                let three = move |t: &[Tensor], f: &dyn Fn(&[Projection; 3]) -> candle_core::Result<Tensor>| {
                    let base = Projection { weight: &t[1], scales: None, bias: o[0].then_some(&t[2]), lora: None };
                    let adapted = projection(t, o, scaling, dropout);
                    f(&[if o[3] { adapted } else { base }, base, if o[4] { adapted } else { base }])
                };
                (
                    shapes,
                    Box::new(move |t| three(t, &|p| ops::lora_qkv(&t[0], p))),
                    Some(Box::new(move |t| three(t, &|p| composed::lora_qkv(&t[0], p)))),
                )
            }
        }
        3 => (
            vec![
                vec![rows, in_dim],
                vec![out_dim, in_dim],
                vec![out_dim],
                vec![rank, in_dim],
                vec![out_dim, rank],
                vec![out_dim],
            ],
            Box::new(move |t| {
                let lora = Lora { a: &t[3], b: &t[4], b_bias: None, scaling, dropout };
                let projection =
                    Projection { weight: &t[1], scales: None, bias: a.then_some(&t[2]), lora: Some(lora) };
                ops::dora_linear(&t[0], &projection, &t[5])
            }),
            None,
        ),
        4 => {
            let packed = 3 * heads * in_dim;
            let window = case.window.map(|side| side as usize % 12);
            let config = move |t: &[Tensor], run: &dyn Fn(&RelPosAttention) -> candle_core::Result<Tensor>| {
                run(&RelPosAttention {
                    num_heads: heads,
                    softmax_scale: scaling,
                    rel_pos: a.then_some((&t[1], &t[2])),
                    window,
                    pad: b.then_some(&t[3]),
                    dropout,
                })
            };
            let length =
                |side: usize| if e { rank + 2 } else { 2 * window.unwrap_or(side).max(1) - 1 };
            (
                vec![
                    vec![batch, rows, out_dim, packed],
                    vec![length(rows), in_dim],
                    vec![length(out_dim), in_dim],
                    vec![packed],
                ],
                Box::new(move |t| config(t, &|c| ops::rel_pos_attention(&t[0], c))),
                (!e && window != Some(0)).then(|| {
                    Box::new(move |t: &[Tensor]| {
                        config(t, &|c| Ok(composed::rel_pos_attention(&t[0], c)?.0))
                    }) as Operation
                }),
            )
        }
        _ => (
            vec![vec![batch, rows, in_dim]],
            Box::new(move |t| {
                ops::dropout(&t[0], dropout.unwrap_or(Dropout { p: 0.5, seed: 1, stream: 2 }))
            }),
            None,
        ),
    };
    let inputs = shapes.iter().map(|dims| tensor(u, dims, dtype)).collect::<Drawn<Vec<_>>>()?;
    let Ok((ours, grads)) = run(&inputs, trained, &fused) else { return Ok(()) };
    let tame = inputs.iter().all(|t| values(t).iter().all(|x| x.abs() < 100.0));
    let single = inputs.iter().all(|t| t.dtype() == DType::F32);
    if let (Some(plain), true, true) = (plain, tame, single) {
        let (theirs, expected) =
            run(&inputs, trained, &plain).expect("what the fused takes, the composed takes");
        assert_eq!(ours.dims(), theirs.dims());
        same("result", &ours, &theirs);
        // A sum that is exactly 0 comes of zeros; there candle has another derivative of ReLU than PyTorch and this
        // crate.
        let kink = matches!(activation, Activation::Relu)
            && inputs.iter().any(|t| values(t).contains(&0.0));
        for (index, (grad, expected)) in grads.iter().zip(&expected).enumerate() {
            if kink {
                break;
            }
            match (grad, expected) {
                (Some(grad), Some(expected)) => same(&format!("gradient {index}"), grad, expected),
                (None, Some(expected)) => {
                    let zero = values(expected).iter().all(|x| *x == 0.0);
                    assert!(zero, "gradient {index} is missing");
                }
                _ => {}
            }
        }
    }
    Ok(())
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = one(&mut Unstructured::new(bytes));
});
