//! Every operation against what PyTorch computes in f64, output and all gradients.
//!
//! The fixtures hold f64 results rounded to f32; the operations compute in f32. The bounds are a few dozen units of
//! f32 rounding (6e-8) relative to the largest value, for sums of up to a few hundred terms.

use crate::common::{cases, gradients, tensor_error, Case, Worst};
use candle_core::{Result, Tensor};
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::{philox4x32, Dropout};

fn dropout(case: &Case, prefix: &str) -> Option<Dropout> {
    let p = case.number(&format!("{prefix}p"));
    (p > 0.0).then(|| Dropout {
        p,
        seed: case.integer(&format!("{prefix}seed")),
        stream: case.integer(&format!("{prefix}stream")) as u32,
    })
}

/// Takes the named tensors that exist in the case, in order; `pick` then finds one again by name.
struct Inputs {
    names: Vec<String>,
    tensors: Vec<Tensor>,
}

impl Inputs {
    fn new(case: &Case, names: &[&str]) -> Self {
        let present = names.iter().filter_map(|name| Some((name.to_string(), case.get(name)?)));
        let (names, tensors) = present.unzip();
        Self { names, tensors }
    }

    fn pick<'a>(&self, tensors: &'a [Tensor], name: &str) -> Option<&'a Tensor> {
        self.names.iter().position(|n| n == name).map(|i| &tensors[i])
    }

    fn compare(
        &self,
        worst: &mut Worst,
        case: &Case,
        f: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let (out, grads) = gradients(&self.tensors, &case.tensor("grad_out"), f)?;
        worst.note("out", &case.name, tensor_error(&out, &case.tensor("out")));
        for (name, grad) in self.names.iter().zip(&grads) {
            let expected = case.tensor(&format!("grad_{name}"));
            worst.note(&format!("grad_{name}"), &case.name, tensor_error(grad, &expected));
        }
        Ok(())
    }
}

#[test]
fn philox_words_and_masks() {
    for case in cases("ops/philox.safetensors") {
        let seed = case.integer("seed");
        let counters: Vec<Vec<i64>> = case.tensor("counters").to_vec2().unwrap();
        let words: Vec<Vec<i64>> = case.tensor("words").to_vec2().unwrap();
        for (counter, words) in counters.iter().zip(&words) {
            let counter: Vec<u32> = counter.iter().map(|&c| c as u32).collect();
            let got = philox4x32(counter.try_into().unwrap(), [seed as u32, (seed >> 32) as u32]);
            assert_eq!(got.map(i64::from).to_vec(), *words, "{}", case.name);
        }
        let dropout = Dropout { p: case.number("p"), seed, stream: case.integer("stream") as u32 };
        let (rows, cols) = (case.integer("rows") as usize, case.integer("cols") as usize);
        let keep: Vec<u8> = case.tensor("keep").flatten_all().unwrap().to_vec1().unwrap();
        let mask = dropout.mask(rows, cols);
        assert!(mask.iter().zip(&keep).all(|(m, &k)| (*m > 0.0) == (k != 0)), "{}", case.name);
    }
}

#[test]
fn layer_norm() -> Result<()> {
    let mut worst = Worst::default();
    for case in cases("ops/layer_norm.safetensors") {
        let eps = case.number("eps");
        let inputs = Inputs::new(&case, &["x", "weight", "bias"]);
        inputs.compare(&mut worst, &case, |t| ops::layer_norm(&t[0], &t[1], &t[2], eps))?;
    }
    worst.check("layer_norm", 4e-6);
    Ok(())
}

#[test]
fn rel_pos_attention() -> Result<()> {
    let mut worst = Worst::default();
    for case in cases("ops/rel_pos_attention.safetensors") {
        let window = case.integer("window") as usize;
        let (h, w) = (case.tensor("qkv").dim(1)?, case.tensor("qkv").dim(2)?);
        let padded = window > 0 && (h % window != 0 || w % window != 0);
        let mut names = vec!["qkv", "rel_pos_h", "rel_pos_w"];
        if padded {
            names.push("pad");
        }
        let inputs = Inputs::new(&case, &names);
        inputs.compare(&mut worst, &case, |t| {
            let config = RelPosAttention {
                num_heads: case.integer("num_heads") as usize,
                softmax_scale: case.number("softmax_scale"),
                rel_pos: inputs.pick(t, "rel_pos_h").zip(inputs.pick(t, "rel_pos_w")),
                window: (window > 0).then_some(window),
                pad: inputs.pick(t, "pad"),
                dropout: dropout(&case, "dropout_"),
            };
            ops::rel_pos_attention(&t[0], &config)
        })?;
    }
    worst.check("rel_pos_attention", 1e-5);
    Ok(())
}

#[test]
fn multi_head_attention() -> Result<()> {
    let mut worst = Worst::default();
    for case in cases("ops/multi_head_attention.safetensors") {
        let heads = case.integer("num_heads") as usize;
        let scale = case.number("softmax_scale");
        let inputs = Inputs::new(&case, &["q", "k", "v"]);
        inputs.compare(&mut worst, &case, |t| {
            ops::multi_head_attention(&t[0], [&t[1], &t[2]], heads, scale)
        })?;
    }
    worst.check("multi_head_attention", 1e-5);
    Ok(())
}

/// With `train_weight`, the weight is a variable too, which takes the composed path.
fn lora_linear(train_weight: bool) -> Result<()> {
    let mut worst = Worst::default();
    for case in cases("ops/lora_linear.safetensors") {
        let mut names = vec!["x", "bias", "residual", "A", "B", "b_bias"];
        if train_weight {
            names.push("weight");
        }
        let inputs = Inputs::new(&case, &names);
        let frozen = case.tensor("weight");
        let gelu = case.flag("gelu");
        inputs.compare(&mut worst, &case, |t| {
            let lora = inputs.pick(t, "A").zip(inputs.pick(t, "B")).map(|(a, b)| Lora {
                a,
                b,
                b_bias: inputs.pick(t, "b_bias"),
                scaling: case.number("scaling"),
                dropout: dropout(&case, "dropout_"),
            });
            let weight = inputs.pick(t, "weight").unwrap_or(&frozen);
            let projection =
                Projection { weight, scales: None, bias: inputs.pick(t, "bias"), lora };
            let activation = if gelu { Activation::Gelu } else { Activation::Identity };
            ops::lora_linear(&t[0], &projection, activation, inputs.pick(t, "residual"))
        })?;
    }
    worst.check(if train_weight { "lora_linear, composed" } else { "lora_linear" }, 3e-6);
    Ok(())
}

#[test]
fn lora_linear_frozen_weight() -> Result<()> {
    lora_linear(false)
}

#[test]
fn lora_linear_trained_weight() -> Result<()> {
    lora_linear(true)
}

fn lora_qkv(train_weight: bool) -> Result<()> {
    let mut worst = Worst::default();
    for case in cases("ops/lora_qkv.safetensors") {
        let mut names = vec!["x".to_string()];
        for p in ["q", "k", "v"] {
            names.extend(["bias", "A", "B", "b_bias"].map(|tensor| format!("{tensor}_{p}")));
            if train_weight {
                names.push(format!("weight_{p}"));
            }
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let inputs = Inputs::new(&case, &names);
        let frozen = ["q", "k", "v"].map(|p| case.tensor(&format!("weight_{p}")));
        inputs.compare(&mut worst, &case, |t| {
            let pick = |tensor: &str, p: &str| inputs.pick(t, &format!("{tensor}_{p}"));
            let projection = |index: usize| {
                let p = ["q", "k", "v"][index];
                Projection {
                    weight: pick("weight", p).unwrap_or(&frozen[index]),
                    scales: None,
                    bias: pick("bias", p),
                    lora: pick("A", p).zip(pick("B", p)).map(|(a, b)| Lora {
                        a,
                        b,
                        b_bias: pick("b_bias", p),
                        scaling: case.number(&format!("scaling_{p}")),
                        dropout: dropout(&case, &format!("dropout_{p}_")),
                    }),
                }
            };
            ops::lora_qkv(&t[0], &[projection(0), projection(1), projection(2)])
        })?;
    }
    worst.check(if train_weight { "lora_qkv, composed" } else { "lora_qkv" }, 3e-6);
    Ok(())
}

#[test]
fn lora_qkv_frozen_weights() -> Result<()> {
    lora_qkv(false)
}

#[test]
fn lora_qkv_trained_weights() -> Result<()> {
    lora_qkv(true)
}

#[test]
fn dora() -> Result<()> {
    let mut worst = Worst::default();
    for case in cases("ops/dora.safetensors") {
        let inputs = Inputs::new(&case, &["x", "A", "B", "magnitude"]);
        let (weight, bias) = (case.tensor("weight"), case.get("bias"));
        let scaling = case.number("scaling");
        let norm = ops::dora_weight_norm(&weight, &case.tensor("A"), &case.tensor("B"), scaling)?;
        worst.note("norm", &case.name, tensor_error(&norm, &case.tensor("weight_norm")));
        inputs.compare(&mut worst, &case, |t| {
            let dropout = dropout(&case, "dropout_");
            let lora = Lora { a: &t[1], b: &t[2], b_bias: None, scaling, dropout };
            let base =
                Projection { weight: &weight, scales: None, bias: bias.as_ref(), lora: Some(lora) };
            ops::dora_linear(&t[0], &base, &t[3])
        })?;
    }
    worst.check("dora", 4e-6);
    Ok(())
}
