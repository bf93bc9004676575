//! The lists of cases: small ones that hold every path, and large ones.

pub use super::operations::*;
use super::values;
use candle_core::{Result, Tensor};
use candle_sam_lora::ops::Activation;
use candle_sam_lora::testing::{allow_instructions, Instructions};

/// The environment's name of the instructions that the CPU path may use in these cases.
pub const INSTRUCTIONS: &str = "INSTRUCTIONS_OF_TESTS";

fn allow_the_environments_instructions() {
    match std::env::var(INSTRUCTIONS).as_deref() {
        Err(_) => {}
        Ok("avx2") => allow_instructions(Instructions::Avx2),
        Ok("scalar") => allow_instructions(Instructions::Scalar),
        Ok(other) => panic!("{INSTRUCTIONS}={other}"),
    }
}

pub fn all() -> Vec<Op<'static>> {
    allow_the_environments_instructions();
    use Activation::{Gelu, GeluTanh, Relu, Silu};
    let dropped = LoraLinear { dropout: Some(DROPOUT), ..PLAIN };
    let attention = Attention {
        batch: 1,
        grid: (3, 4),
        heads: 2,
        dim: 5,
        window: None,
        tables: (5, 7),
        dropout: None,
    };
    let tokens = MultiHead { batch: (2, 2), queries: 4, keys: 5, heads: 2, dim: 5 };
    vec![
        layer_norm(&[3, 4, 7]),
        layer_norm(&[1, 1]),
        layer_norm(&[130, 9]),
        LoraLinear { rows: 3, in_dim: 5, out_dim: 7, rank: 2, ..PLAIN }.op(),
        LoraLinear { rows: 3, in_dim: 8, out_dim: 6, rank: 3, activation: Gelu, ..dropped }.op(),
        LoraLinear { rows: 2, in_dim: 4, out_dim: 5, activation: Relu, ..PLAIN }.op(),
        LoraLinear { rows: 2, in_dim: 5, out_dim: 4, activation: GeluTanh, ..dropped }.op(),
        LoraLinear { rows: 3, in_dim: 4, out_dim: 3, activation: Silu, ..PLAIN }.op(),
        LoraLinear { rows: 300, in_dim: 3, out_dim: 2, rank: 5, activation: Gelu, ..dropped }.op(),
        LoraQkv { rows: 5, dim: 6, rank_q: 2, rank_v: 3 }.op(),
        LoraQkv { rows: 1, dim: 1, rank_q: 1, rank_v: 4 }.op(),
        attention.op(),
        Attention { dropout: Some(DROPOUT), ..attention }.op(),
        Attention { grid: (1, 1), tables: (1, 1), ..attention }.op(),
        Attention { grid: (1, 9), tables: (1, 17), ..attention }.op(),
        Attention { window: Some(2), tables: (3, 3), ..attention }.op(),
        Attention { window: Some(3), tables: (5, 5), batch: 2, ..attention }.op(),
        Attention { window: Some(3), tables: (5, 5), dropout: Some(DROPOUT), ..attention }.op(),
        Attention { window: Some(6), tables: (11, 11), ..attention }.op(),
        Attention { tables: (9, 4), ..attention }.op(),
        tokens.op(),
        MultiHead { queries: 1, keys: 1, heads: 1, dim: 1, ..tokens }.op(),
        MultiHead { batch: (3, 1), ..tokens }.op(),
        MultiHead { batch: (1, 2), dim: 16, ..tokens }.op(),
        // More queries than a block, more keys than a tile.
        MultiHead { queries: 100, keys: 3, dim: 16, heads: 1, ..tokens }.op(),
        MultiHead { queries: 3, keys: 260, dim: 3, heads: 1, ..tokens }.op(),
        Attention { grid: (9, 33), heads: 1, dim: 3, tables: (17, 65), ..attention }.op(),
    ]
}

/// DoRA. Its norm has no gradient, so finite differences of the reference do not apply.
pub fn dora() -> Vec<Op<'static>> {
    let plain = DoraLinear { rows: 5, in_dim: 9, out_dim: 6, rank: 2, dropout: None };
    let dropped = Some(DROPOUT);
    let long = DoraLinear { rows: 300, in_dim: 8, out_dim: 7, rank: 3, dropout: dropped };
    vec![plain.op(), long.op()]
}

/// Sizes as SAM has them, of which a naive reference can still do a few: for what tiles its work.
pub fn large() -> Vec<Op<'static>> {
    let dropped = LoraLinear { dropout: Some(DROPOUT), activation: Activation::Gelu, ..PLAIN };
    let attention = |dim, window: Option<usize>, grid: (usize, usize)| {
        let side = |length: usize| window.unwrap_or(length);
        let tables = (2 * side(grid.0) - 1, 2 * side(grid.1) - 1);
        Attention { batch: 1, grid, heads: 2, dim, window, tables, dropout: None }.op()
    };
    vec![
        layer_norm(&[2, 14, 14, 768]),
        layer_norm(&[5, 1280]),
        dropout(&[3, 100, 77]),
        LoraLinear { rows: 65, in_dim: 768, out_dim: 129, rank: 16, ..dropped }.op(),
        LoraLinear { rows: 1, in_dim: 96, out_dim: 64, rank: 7, ..PLAIN }.op(),
        DoraLinear { rows: 65, in_dim: 96, out_dim: 72, rank: 16, dropout: Some(DROPOUT) }.op(),
        DoraLinear { rows: 33, in_dim: 40, out_dim: 129, rank: 5, dropout: None }.op(),
        LoraQkv { rows: 130, dim: 128, rank_q: 8, rank_v: 100 }.op(),
        // Enough rows for the projections' large tiles.
        LoraQkv { rows: 1793, dim: 384, rank_q: 16, rank_v: 4 }.op(),
        attention(64, Some(14), (16, 20)),
        // Key tiles of 64 and of 40 columns.
        attention(64, None, (3, 64)),
        attention(80, None, (5, 40)),
        attention(80, None, (10, 12)),
        attention(64, None, (20, 20)),
        attention(16, Some(7), (14, 14)),
        attention(32, None, (7, 9)),
        MultiHead { batch: (2, 1), queries: 7, keys: 1024, heads: 8, dim: 16 }.op(),
        MultiHead { batch: (2, 2), queries: 1024, keys: 7, heads: 8, dim: 16 }.op(),
        MultiHead { batch: (3, 3), queries: 7, keys: 7, heads: 8, dim: 32 }.op(),
        MultiHead { batch: (1, 1), queries: 130, keys: 300, heads: 2, dim: 20 }.op(),
    ]
}

/// The output has the same bits behind any strides and offsets of an input.
pub fn assert_any_strides(op: &Op, inputs: &[Tensor]) -> Result<()> {
    let expected = values(&(op.fused)(inputs)?);
    for index in 0..inputs.len() {
        for disguise in disguises(&inputs[index])? {
            let mut inputs = inputs.to_vec();
            inputs[index] = disguise;
            let got = values(&(op.fused)(&inputs)?);
            assert!(got == expected, "{} input {index}: {:?}", op.name, inputs[index].layout());
        }
    }
    Ok(())
}

/// The same values behind other strides and offsets.
pub fn disguises(t: &Tensor) -> Result<Vec<Tensor>> {
    let mut disguises = Vec::new();
    if t.rank() >= 2 {
        let (a, b) = (t.rank() - 2, t.rank() - 1);
        disguises.push(t.transpose(a, b)?.contiguous()?.transpose(a, b)?);
    }
    let wide = Tensor::cat(&[t, t, t], 0)?;
    disguises.push(wide.narrow(0, t.dim(0)?, t.dim(0)?)?);
    let last = t.rank() - 1;
    let interleaved = Tensor::stack(&[&t.zeros_like()?, t], last + 1)?;
    disguises.push(interleaved.narrow(last + 1, 1, 1)?.squeeze(last + 1)?);
    Ok(disguises)
}
