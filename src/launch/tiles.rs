//! Which tile a problem gets, as data: what was measured ([`MEASURED`](super::measured::MEASURED)), and a rule for all
//! that was not.
//!
//! | family | shape | rule |
//! |---|---|---|
//! | `rel_pos_attention_*` | head_dim, width of the window | the columns whose stripes leave least of the window's width empty; of equals 64, then 16, then 40 |
//! | `projection_*` | in_dim, sum of out_dims; rows | `choose` of `projection.rs` and `projection_sm90.rs` |
//!
//! On Hopper a problem may have `portable` for a tile. A row of 64 tokens is one rel_h for 64 keys; stripes of 40 are for
//! grids of 40 and 80, of 16 for windows of 14.

use super::measured::MEASURED;
use super::projection;
use candle_core::DType;
use std::cell::RefCell;

/// A row of the table: the tile of the problems of a family that have this shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// The file of the kernels.
    pub family: &'static str,
    /// Of an element.
    pub bytes: usize,
    /// As above.
    pub shape: [usize; 2],
    /// From so many rows on, until a row of the table with more; 0 where rows do not matter.
    pub rows: usize,
    /// As the kernels' names have it.
    pub tile: &'static str,
}

/// The attention's families.
pub const ATTENTION: [&str; 5] = [
    "rel_pos_attention_fwd",
    "rel_pos_attention_bwd_query",
    "rel_pos_attention_fwd_sm90",
    "rel_pos_attention_bwd_query_sm90",
    "rel_pos_attention_bwd_key_sm90",
];
/// The projections' families.
pub const PROJECTION: [&str; 4] =
    ["projection_fwd", "projection_bwd_input", "projection_fwd_sm90", "projection_bwd_input_sm90"];
/// In the place of one of Hopper's tiles: the portable kernels, whose own table goes on.
pub const PORTABLE: &str = "portable";

/// Columns of the attention's key tiles, and the names of these; of equals, the rule takes the first.
const COLUMNS: [(usize, &str); 3] = [(64, "cols64"), (16, "cols16"), (40, "cols40")];
/// Names of the projections' tiles.
const SQUARES: [&str; 2] = ["128x128", "64x64"];

/// A family and one of its tiles.
type Named = (&'static str, &'static str);

thread_local! {
    static FORCED: RefCell<Vec<Named>> = const { RefCell::new(Vec::new()) };
}

/// For tuning: makes this thread give all problems of a family this tile, if it is one of [`candidates`].
pub fn force(family_and_tile: Option<Named>) {
    FORCED.replace(family_and_tile.into_iter().collect());
}

/// For self-tests: calls `f` while this thread gives all problems of these families these tiles.
pub fn forced<R>(tiles: &[Named], f: impl FnOnce() -> R) -> R {
    struct Restore(Vec<Named>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.replace(std::mem::take(&mut self.0));
        }
    }
    let _restore = Restore(FORCED.replace(tiles.to_vec()));
    f()
}

/// The tiles of a family that there are kernels for; for tuning.
pub fn candidates(family: &str, bytes: usize, shape: [usize; 2]) -> Vec<&'static str> {
    let hopper = family.ends_with("_sm90");
    let mut names: Vec<_> = if hopper && bytes != 2 {
        Vec::new()
    } else if ATTENTION.contains(&family) {
        attention_columns(bytes, shape[0]).map(|(_, name)| name).collect()
    } else if family == PROJECTION[2] {
        projection::sm90::forward::FORWARD_TILES.to_vec()
    } else if family == PROJECTION[3] {
        projection::sm90::forward::BACKWARD_TILES.to_vec()
    } else if PROJECTION.contains(&family) {
        SQUARES.to_vec()
    } else {
        Vec::new()
    };
    if hopper {
        names.push(PORTABLE);
    }
    names
}

/// The tile that a problem gets today, as far as it hangs on this alone; for tuning.
pub fn current(family: &str, dtype: DType, shape: [usize; 2], rows: usize) -> Option<&'static str> {
    known(family, dtype, shape, rows).or_else(|| {
        let cols = attention(family, dtype, shape[0], shape[1]);
        let named = COLUMNS.into_iter().find(|(c, _)| *c == cols && ATTENTION.contains(&family));
        named.map(|(_, name)| name)
    })
}

/// Heads of up to 32 channels, and all in f32, have the narrow tile only.
fn attention_columns(bytes: usize, dim: usize) -> impl Iterator<Item = (usize, &'static str)> {
    COLUMNS.into_iter().filter(move |&(cols, _)| cols == 16 || (bytes == 2 && dim > 32))
}

/// The tiles of a family that were measured.
pub(super) fn measured(family: &str) -> impl Iterator<Item = &'static str> + '_ {
    MEASURED.iter().filter(move |row| row.family == family).map(|row| row.tile)
}

/// The tile that was measured, or is forced.
pub(super) fn known(
    family: &str,
    dtype: DType,
    shape: [usize; 2],
    rows: usize,
) -> Option<&'static str> {
    let bytes = dtype.size_in_bytes();
    let of_family = |named: &&Named| named.0 == family;
    let forced = FORCED.with_borrow(|tiles| tiles.iter().find(of_family).map(|named| named.1));
    let tile = forced.or_else(|| in_table(MEASURED, family, bytes, shape, rows))?;
    candidates(family, bytes, shape).contains(&tile).then_some(tile)
}

fn in_table(
    table: &[Measured],
    family: &str,
    bytes: usize,
    shape: [usize; 2],
    rows: usize,
) -> Option<&'static str> {
    let same = |row: &&Measured| row.family == family && row.bytes == bytes && row.shape == shape;
    let rows = table.iter().filter(same).filter(|row| row.rows <= rows);
    rows.max_by_key(|row| row.rows).map(|row| row.tile)
}

/// Columns of a key tile of the attention: 64, 40 or 16.
pub(super) fn attention(family: &str, dtype: DType, head_dim: usize, width: usize) -> usize {
    let known = known(family, dtype, [head_dim, width], 0);
    if let Some((cols, _)) = COLUMNS.into_iter().find(|(_, name)| known == Some(name)) {
        return cols;
    }
    let compiled = attention_columns(dtype.size_in_bytes(), head_dim).map(|(cols, _)| cols);
    compiled.min_by_key(|&cols| width.next_multiple_of(cols)).unwrap_or(16)
}

#[cfg(test)]
mod tests {
    use super::super::projection::sm90::{
        backward as projection_bwd_sm90, forward as projection_sm90,
    };
    use super::super::rel_pos_attention::sm90::{
        backward as rel_pos_attention_bwd_sm90, forward as rel_pos_attention_sm90,
    };
    use super::super::{projection, rel_pos_attention};
    use super::super::{AttentionProblem, Gpu, Launch};
    use super::*;
    use candle_core::Result;

    /// Every family with shapes that SAM has, and every tile.
    fn all_rows() -> Vec<Measured> {
        let mut rows = MEASURED.to_vec();
        for (families, shapes) in [
            (
                &ATTENTION[..],
                [[64, 64], [80, 64], [64, 14], [80, 14], [64, 40], [80, 48], [16, 14]],
            ),
            (
                &PROJECTION[..],
                [
                    [768, 2304],
                    [768, 768],
                    [768, 3072],
                    [3072, 768],
                    [1024, 3072],
                    [1280, 3840],
                    [96, 72],
                ],
            ),
        ] {
            for (&family, shape) in families.iter().flat_map(|f| shapes.map(|shape| (f, shape))) {
                for bytes in [2, 4] {
                    let tiles = candidates(family, bytes, shape);
                    assert!(!tiles.is_empty(), "{family} {shape:?}");
                    rows.extend(tiles.into_iter().map(|tile| Measured {
                        family,
                        bytes,
                        shape,
                        rows: 4096,
                        tile,
                    }));
                }
            }
        }
        rows
    }

    /// The family's kernel that a row's problem launches, if any.
    fn launched(row: &Measured) -> Result<Option<Launch>> {
        let (at, gpu) = (1 << 20, &Gpu::H100);
        let dtype = if row.bytes == 4 { DType::F32 } else { DType::BF16 };
        let [inner, outer] = row.shape;
        let launches = if PROJECTION.contains(&row.family) {
            use projection::{Activation, BackwardOperands, ForwardOperands, Problem, Small};
            let part = projection::ProjectionProblem { out_dim: outer, bias: true, lora: None };
            let (weights, activation) = (&[at][..], Activation::Identity);
            let (rows, in_dim, projections) = (row.rows, inner, &[part][..]);
            let problem = Problem { rows, in_dim, projections, activation };
            let ([x, out, dout, dx, workspace], small, none) = ([at; 5], Small::Flat(at), 0);
            let (low_rank, sum, residual, dsmall) = (none, none, none, none);
            let forward = ForwardOperands { x, weights, small, residual, out, low_rank, sum };
            match row.family {
                "projection_fwd" => projection::forward(&problem, dtype, &forward, gpu)?,
                "projection_fwd_sm90" => {
                    projection_sm90::forward(&problem, dtype, &forward, gpu)?.unwrap_or_default()
                }
                of_backward => {
                    let backward = BackwardOperands {
                        x,
                        weights,
                        small,
                        low_rank,
                        sum,
                        dout,
                        dx,
                        dsmall,
                        workspace,
                    };
                    match of_backward {
                        "projection_bwd_input" => {
                            projection::backward(&problem, dtype, &backward, gpu)?
                        }
                        _ => projection_bwd_sm90::backward(&problem, dtype, &backward, gpu)?
                            .unwrap_or_default(),
                    }
                }
            }
        } else {
            use rel_pos_attention::{backward, forward, BackwardOperands, Inputs};
            let problem = AttentionProblem {
                batch: 1,
                h: outer,
                w: outer,
                num_heads: 2,
                head_dim: inner,
                side_h: outer,
                side_w: outer,
                softmax_scale: 0.125,
                rel_pos: true,
                dropout: None,
            };
            let inputs = Inputs { qkv: at, tables: [at; 2], pad: at };
            let [out, lse, dout, dqkv, dtables, dpad, workspace] = [at; 7];
            match row.family {
                "rel_pos_attention_fwd" => vec![forward(&problem, dtype, &inputs, out, lse)?],
                "rel_pos_attention_fwd_sm90" => {
                    let own = rel_pos_attention_sm90::forward(&problem, dtype, &inputs, out, lse)?;
                    own.into_iter().collect()
                }
                family => {
                    // Padding, and so its gradient, is the portable kernels' alone.
                    let dpad = if family.ends_with("_sm90") { 0 } else { dpad };
                    let operands =
                        BackwardOperands { out, lse, dout, dqkv, dtables, dpad, workspace };
                    if family.ends_with("_sm90") {
                        let by_hopper = rel_pos_attention_bwd_sm90::backward;
                        by_hopper(&problem, dtype, &inputs, &operands, gpu)?.unwrap_or_default()
                    } else {
                        backward(&problem, dtype, &inputs, &operands, gpu)?
                    }
                }
            }
        };
        Ok(launches.into_iter().find(|launch| launch.kernel.starts_with(row.family)))
    }

    #[test]
    fn every_row_launches_its_tile_and_fits() -> Result<()> {
        for row in all_rows() {
            force(Some((row.family, row.tile)));
            let launched = launched(&row);
            force(None);
            let hopper = row.family.ends_with("_sm90");
            let Some(launch) = launched? else {
                assert!(
                    hopper && [PORTABLE, "cols16", "cols40", "cols64"].contains(&row.tile),
                    "{row:?}"
                );
                continue;
            };
            let name = format!("_{}_", row.tile);
            assert!(launch.kernel.contains(&name), "{row:?}: {}", launch.kernel);
            let most = if hopper { 227 << 10 } else { 163 << 10 };
            assert!(launch.shared_bytes <= most, "{row:?}: {} bytes", launch.shared_bytes);
        }
        Ok(())
    }

    #[test]
    fn of_a_shape_s_rows_the_one_with_most_rows_that_the_problem_has_is_taken() {
        let row = |rows, tile| Measured {
            family: "projection_fwd",
            bytes: 2,
            shape: [768, 2304],
            rows,
            tile,
        };
        let table = [row(4096, "64x64"), row(16384, "128x128")];
        let found = |bytes, shape, rows| in_table(&table, "projection_fwd", bytes, shape, rows);
        assert_eq!(found(2, [768, 2304], 4095), None);
        assert_eq!(found(2, [768, 2304], 4096), Some("64x64"));
        assert_eq!(found(2, [768, 2304], 20000), Some("128x128"));
        assert_eq!(found(4, [768, 2304], 4096), None);
        assert_eq!(found(2, [768, 768], 4096), None);
    }

    #[test]
    fn the_rule_wastes_least_of_the_width() {
        let cols = |dtype, head_dim, width| attention(ATTENTION[0], dtype, head_dim, width);
        for (width, expected) in [
            (14, 16),
            (32, 16),
            (48, 16),
            (37, 40),
            (40, 40),
            (80, 16),
            (50, 64),
            (64, 64),
            (128, 64),
        ] {
            assert_eq!(cols(DType::BF16, 64, width), expected, "{width}");
        }
        assert_eq!((cols(DType::F32, 64, 64), cols(DType::BF16, 32, 64)), (16, 16));
    }

    #[test]
    fn a_tile_that_is_forced_is_taken_if_it_exists() {
        force(Some((ATTENTION[0], "cols40")));
        assert_eq!(attention(ATTENTION[0], DType::BF16, 64, 64), 40);
        assert_eq!(attention(ATTENTION[1], DType::BF16, 64, 64), 64);
        assert_eq!(attention(ATTENTION[0], DType::F32, 64, 64), 16);
        force(None);
        assert_eq!(attention(ATTENTION[0], DType::BF16, 64, 64), 64);
    }
}
