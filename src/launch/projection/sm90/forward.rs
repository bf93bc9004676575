//! Projections with LoRA on Hopper: the tiles of `kernels/projection/sm90/common.cuh`, and the launch of the forward,
//! `kernels/projection/sm90/fwd.cuh`. The portable kernels serve the other problems, and compute the thin product S.
//!
//! A kernel's blocks stay, one on each multiprocessor, and make tile after tile. Which tile a problem gets is a table,
//! [`CHOICES`].

use crate::launch::bindings::{
    device_ptr, EncodedTensorMap, ProjectionFwdSm90Params,
    PROJECTION_SM90_COOPERATIVE_128X192_SHARED_BYTES,
    PROJECTION_SM90_COOPERATIVE_128X256_SHARED_BYTES,
    PROJECTION_SM90_PINGPONG_128X192_SHARED_BYTES, PROJECTION_SM90_THREADS,
};
use crate::launch::projection::portable::{low_rank_input, ForwardOperands, Problem, Shapes};
use crate::launch::tensor_map::{Element, TensorMap, LONGEST};
use crate::launch::{tiles, Gpu, Launch};
use candle_core::{bail, DType, Result};
use std::mem::{offset_of, size_of};

/// A tile of the output that a block makes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// As the kernels' names have it. `pingpong`: two warpgroups take tiles in turn, so that one's epilogue runs beside
    /// the other's products; `cooperative`: they share each one's rows. [`X2`]: two blocks are a cluster.
    pub name: &'static str,
    pub(in crate::launch) rows: u32,
    cols: u32,
    /// Blocks of a cluster, which make tiles of the same columns, one below the other, and load the weights once.
    pub(in crate::launch) cluster: u32,
    shared_bytes: u32,
}

/// How the names of tiles end that a cluster of two blocks makes. There is one of the same name without it, for devices
/// without clusters.
pub const X2: &str = "_x2";

const PINGPONG_128X192: Tile = Tile {
    name: "pingpong_128x192",
    rows: 128,
    cols: 192,
    cluster: 1,
    shared_bytes: PROJECTION_SM90_PINGPONG_128X192_SHARED_BYTES,
};
const COOPERATIVE_128X192: Tile = Tile {
    name: "cooperative_128x192",
    shared_bytes: PROJECTION_SM90_COOPERATIVE_128X192_SHARED_BYTES,
    ..PINGPONG_128X192
};
const COOPERATIVE_128X256: Tile = Tile {
    name: "cooperative_128x256",
    rows: 128,
    cols: 256,
    shared_bytes: PROJECTION_SM90_COOPERATIVE_128X256_SHARED_BYTES,
    ..PINGPONG_128X192
};
/// All tiles that some kernel has.
const TILES: [Tile; 5] = [
    PINGPONG_128X192,
    Tile { name: "pingpong_128x192_x2", cluster: 2, ..PINGPONG_128X192 },
    COOPERATIVE_128X192,
    COOPERATIVE_128X256,
    Tile { name: "cooperative_128x256_x2", cluster: 2, ..COOPERATIVE_128X256 },
];

/// The tiles of the forward, by name.
pub const FORWARD_TILES: [&str; 4] =
    ["pingpong_128x192", "pingpong_128x192_x2", "cooperative_128x256", "cooperative_128x256_x2"];
/// The tiles of the gradient of x, by name.
pub const BACKWARD_TILES: [&str; 5] = [
    "pingpong_128x192",
    "pingpong_128x192_x2",
    "cooperative_128x192",
    "cooperative_128x256",
    "cooperative_128x256_x2",
];

/// A row of the table: a tile, and the launches that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The kernels: `projection_fwd_sm90` or `projection_bwd_input_sm90`.
    pub family: &'static str,
    /// All outputs, or x, are as wide as multiples of this.
    pub width: u32,
    /// There are at least so many tiles, those of a cluster's blocks counted each.
    pub tiles: u64,
    /// The tile's name.
    pub tile: &'static str,
}

/// The first row that fits is taken; where none does, the portable kernels'. Not measured: reckoned for 132
/// multiprocessors from what a step of 64 of depth costs, `rows cols / 32` cycles of the tensor cores and
/// `128 (rows + cols / cluster)` bytes from the L2 cache.
pub const CHOICES: [Choice; 6] = [
    // Widths of ViT-B. 37 bytes a cycle, without a cluster 53, and an epilogue that costs nothing.
    Choice { family: FORWARD, width: 192, tiles: 66, tile: "pingpong_128x192_x2" },
    // Of ViT-L and ViT-H, which tiles of 192 do not fill. 32 bytes a cycle, without a cluster 48.
    Choice { family: FORWARD, width: 256, tiles: 66, tile: "cooperative_128x256_x2" },
    // With fewer tiles than for every other multiprocessor, smaller portable ones are faster.
    Choice { family: FORWARD, width: 1, tiles: 66, tile: "pingpong_128x192_x2" },
    // qkv of ViT-B: products of 28 thousand cycles a tile. Two masks and low-rank products take 10 to 14 thousand if all
    // warps make them before the next tile, 24 thousand by one warpgroup, beside the other's products.
    Choice { family: BWD_INPUT, width: 192, tiles: 66, tile: "pingpong_128x192_x2" },
    // Of ViT-L: with LoRA 245 to 262 cycles a column against 216 in a ping-pong's tiles, of which it fills 5.3 of 6;
    // without 204, and most linears have none.
    Choice { family: BWD_INPUT, width: 256, tiles: 66, tile: "cooperative_128x256_x2" },
    Choice { family: BWD_INPUT, width: 1, tiles: 66, tile: "pingpong_128x192_x2" },
];

/// Multiprocessors of the device that [`CHOICES`] counts tiles for; others want tiles in proportion.
const MULTIPROCESSORS: u64 = 132;
const FORWARD: &str = tiles::PROJECTION[2];
pub(in crate::launch) const BWD_INPUT: &str = tiles::PROJECTION[3];
/// Columns that a warp stores at once, of 16 rows.
pub(in crate::launch) const PIECE: (u32, u32) = (16, 64);
/// Elements of a row of a stage: 128 bytes.
pub(in crate::launch) const DEPTH: u32 = 64;
const LOW_RANK_DEPTH: u32 = 32;

impl Tile {
    pub(in crate::launch) fn columns(&self, widths: &[u32]) -> u64 {
        widths.iter().map(|width| u64::from(width.div_ceil(self.cols))).sum()
    }

    /// Tiles of an output of so many rows in these widths, those that a cluster makes together counted once. The last
    /// ones may lie partly, those of a cluster's later blocks entirely below it.
    pub(in crate::launch) fn count(&self, rows: u64, widths: &[u32]) -> u64 {
        rows.div_ceil((self.cluster * self.rows).into()) * self.columns(widths)
    }
}

/// The tile of this name.
///
/// # Errors
/// If there is none.
pub(in crate::launch) fn tile(name: &str) -> Result<&'static Tile> {
    match TILES.iter().find(|tile| tile.name == name) {
        Some(tile) => Ok(tile),
        None => bail!("projection: no tile {name:?}; there are {:?}", TILES.map(|tile| tile.name)),
    }
}

/// The name of the tile for an output of `rows` rows in these widths.
fn choose(family: &str, rows: u64, widths: &[u32], gpu: &Gpu) -> Result<Option<&'static str>> {
    for choice in CHOICES.iter().filter(|choice| choice.family == family) {
        let fits = widths.iter().all(|width| width.is_multiple_of(choice.width));
        let tile = tile(choice.tile)?;
        let enough = choice.tiles * gpu.persistent_blocks() / MULTIPROCESSORS;
        if fits && tile.count(rows, widths) * u64::from(tile.cluster) >= enough {
            return Ok(Some(choice.tile));
        }
    }
    Ok(None)
}

/// The tiles that a family's problems get on a device with or without clusters.
pub fn tiles_in_use(family: &str, clusters: bool) -> Vec<&'static str> {
    let named = CHOICES.iter().filter(|choice| choice.family == family).map(|choice| choice.tile);
    let mut names = Vec::new();
    for name in named.chain(tiles::measured(family)) {
        let name = if clusters { name } else { name.strip_suffix(X2).unwrap_or(name) };
        if name != tiles::PORTABLE && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The tile that was measured to be the fastest, or that the table names, for an output in these widths; none for the
/// portable kernels.
pub(in crate::launch) fn chosen(
    family: &str,
    problem: &Problem<'_>,
    dtype: DType,
    widths: &[u32],
    gpu: &Gpu,
) -> Result<Option<&'static str>> {
    let total = problem.projections.iter().map(|part| part.out_dim).sum();
    let name = match tiles::known(family, dtype, [problem.in_dim, total], problem.rows) {
        Some(tiles::PORTABLE) => None,
        None => choose(family, problem.rows as u64, widths, gpu)?,
        known => known,
    };
    Ok(match name {
        Some(name) if !gpu.clusters => Some(name.strip_suffix(X2).unwrap_or(name)),
        name => name,
    })
}

/// Whether the forward or the gradient of x is the kernels' for Hopper, for operands that bulk copies take.
///
/// # Errors
/// On shapes that no kernel takes.
pub(in crate::launch) fn covers(problem: &Problem<'_>, dtype: DType, gpu: &Gpu) -> Result<bool> {
    let shapes = Shapes::new(problem)?;
    let widths: Vec<u32> = problem.projections.iter().map(|part| part.out_dim as u32).collect();
    Ok(copies_take(&shapes, dtype, &[])
        && (chosen(FORWARD, problem, dtype, &widths, gpu)?.is_some()
            || chosen(BWD_INPUT, problem, dtype, &[shapes.in_dim], gpu)?.is_some()))
}

/// Whether bulk copies take the matrices: 16 bits an element, rows and addresses of multiples of 16 bytes, and no more
/// rows or columns than a coordinate counts.
pub(in crate::launch) fn copies_take(
    shapes: &Shapes<'_>,
    dtype: DType,
    addresses: &[device_ptr],
) -> bool {
    let widths = shapes.problem.projections.iter().map(|part| part.out_dim);
    matches!(dtype, DType::F16 | DType::BF16)
        && shapes.in_dim.is_multiple_of(8)
        && widths.into_iter().all(|width| width.is_multiple_of(8))
        && addresses.iter().all(|address| address.is_multiple_of(16))
        && [shapes.problem.rows, shapes.in_dim as usize, shapes.total as usize]
            .iter()
            .all(|size| *size <= LONGEST)
}

/// What [`crate::launch::projection::forward`] launches on Hopper; none where its kernels do not cover the problem, or the table
/// has no tile for it.
///
/// # Errors
/// On shapes that no kernel takes.
pub fn forward(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let widths: Vec<u32> = problem.projections.iter().map(|part| part.out_dim as u32).collect();
    match chosen(FORWARD, problem, dtype, &widths, gpu)? {
        Some(tile) => forward_with(tile, problem, dtype, operands, gpu),
        None => Ok(None),
    }
}

/// The forward with the tile of this name; none if the kernels do not cover the problem.
///
/// # Errors
/// As [`forward`], and if there is no such tile.
pub fn forward_with(
    name: &str,
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let shapes = Shapes::new(problem)?;
    let ForwardOperands { x, residual, out, low_rank, sum, .. } = *operands;
    let parts = shapes.parts(operands.weights, operands.small)?;
    let mut addresses = vec![x, residual, out, low_rank, sum];
    addresses.extend(parts.iter().flat_map(|part| [part.weight, part.b]));
    // Rows of b are its ranks.
    let ranks = shapes.adapted().all(|(_, lora)| lora.rank.is_multiple_of(4));
    if !ranks || !copies_take(&shapes, dtype, &addresses) {
        return Ok(None);
    }
    let tile = tile(name)?;
    let (rows, in_dim, total) = (problem.rows as u32, shapes.in_dim, shapes.total);
    let widths: Vec<u32> = problem.projections.iter().map(|part| part.out_dim as u32).collect();

    type Params = ProjectionFwdSm90Params;
    let mut maps = Maps::default();
    maps.push(offset_of!(Params, x), 0, bits16(x, (rows, in_dim, in_dim), (tile.rows, DEPTH))?);
    for (index, part) in parts.iter().enumerate().take(widths.len()) {
        let weight = (part.out_dim, in_dim, in_dim);
        let weight = bits16(part.weight, weight, (tile.cols / tile.cluster, DEPTH))?;
        maps.push(offset_of!(Params, weight), index, weight);
        if part.rank > 0 {
            let s = low_rank + 4 * u64::from(part.s_column);
            let s = tf32(s, (rows, part.rank, shapes.s_stride), (tile.rows, LOW_RANK_DEPTH))?;
            maps.push(offset_of!(Params, low_rank), index, s);
            let b = (part.out_dim, part.rank, part.rank);
            let b = tf32(part.b, b, (tile.cols / tile.cluster, LOW_RANK_DEPTH))?;
            maps.push(offset_of!(Params, b), index, b);
        }
        for (packed, at) in [
            (residual, offset_of!(Params, residual)),
            (sum, offset_of!(Params, sum)),
            (out, offset_of!(Params, out)),
        ] {
            if packed != 0 {
                let columns = packed + 2 * u64::from(part.column);
                maps.push(at, index, bits16(columns, (rows, part.out_dim, total), PIECE)?);
            }
        }
    }
    let tiles = tile.count(rows.into(), &widths);
    let mut params = Params {
        problem: shapes.forward_params(parts, operands),
        tiles,
        ..bytemuck::Zeroable::zeroed()
    };
    params.problem.column_tiles = tile.columns(&widths) as u32;
    let out = persistent(FORWARD, tile, dtype, (tiles, gpu), &params, maps)?;
    let s = low_rank_input(&shapes, dtype, &parts, operands)?;
    // S's kernel begins when x is there, so this one may begin with x.
    let out = Launch { begins_early: gpu.early_launch && s.is_some(), ..out };
    Ok(Some(s.into_iter().chain([out]).collect()))
}

/// Tensor maps and where they stand.
#[derive(Default)]
pub(in crate::launch) struct Maps(Vec<(usize, TensorMap)>);

impl Maps {
    /// The map of this place of an array of them.
    pub(in crate::launch) fn push(&mut self, array: usize, index: usize, map: TensorMap) {
        self.0.push((array + index * size_of::<EncodedTensorMap>(), map));
    }
}

/// Rows, columns and stride of a matrix, and rows and columns of its tiles.
pub(in crate::launch) fn bits16(
    at: device_ptr,
    matrix: (u32, u32, u32),
    tile: (u32, u32),
) -> Result<TensorMap> {
    TensorMap::matrix(at, Element::Bits16, matrix, tile)
}

fn tf32(at: device_ptr, matrix: (u32, u32, u32), tile: (u32, u32)) -> Result<TensorMap> {
    TensorMap::matrix(at, Element::Tf32, matrix, tile)
}

/// A launch with a block on each multiprocessor that there is work for, at least a cluster.
pub(in crate::launch) fn persistent<P: bytemuck::NoUninit>(
    family: &str,
    tile: &Tile,
    dtype: DType,
    (tiles, gpu): (u64, &Gpu),
    params: &P,
    maps: Maps,
) -> Result<Launch> {
    let cluster = u64::from(tile.cluster);
    let clusters = (gpu.persistent_blocks() / cluster).max(1);
    let grid = [tiles.min(clusters) * cluster, 1, 1];
    let family = format!("{family}_{}", tile.name);
    let launch = Launch::new(&family, dtype, grid, PROJECTION_SM90_THREADS, params)?;
    let &Tile { cluster, shared_bytes, .. } = tile;
    Ok(Launch { shared_bytes, cluster, tensor_maps: maps.0, ..launch })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::projection::{Activation, LoraProblem, ProjectionProblem, Small};

    #[test]
    fn the_table_names_tiles_that_exist_and_serves_sams_linears() -> Result<()> {
        for choice in CHOICES {
            tile(choice.tile)?;
        }
        let name = |rows, widths: &[u32]| {
            choose(FORWARD, rows, widths, &Gpu::H100).map(Option::unwrap_or_default)
        };
        // One image through ViT-B, L and H: qkv, proj, lin1.
        for (width, expected) in [
            (768, "pingpong_128x192_x2"),
            (1024, "cooperative_128x256_x2"),
            (1280, "cooperative_128x256_x2"),
        ] {
            assert_eq!(name(4096, &[width; 3])?, expected);
            assert_eq!(name(4096, &[width])?, expected);
        }
        // Both widths fit lin1 of ViT-B.
        assert_eq!(name(4096, &[3072])?, "pingpong_128x192_x2");
        assert_eq!(name(4096, &[1000])?, "pingpong_128x192_x2");
        assert_eq!(name(196, &[768; 3])?, "");
        // x of the same: of lin2 it is as wide as the output of lin1.
        for (width, expected) in [
            (768, "pingpong_128x192_x2"),
            (3072, "pingpong_128x192_x2"),
            (1024, "cooperative_128x256_x2"),
            (1280, "cooperative_128x256_x2"),
        ] {
            assert_eq!(choose(BWD_INPUT, 4096, &[width], &Gpu::H100)?, Some(expected));
        }
        assert_eq!(choose(BWD_INPUT, 196, &[768], &Gpu::H100)?, None);
        // Tiles for every other multiprocessor, however many there are.
        let small = Gpu { multiprocessors: 14, ..Gpu::H100 };
        assert_eq!(choose(BWD_INPUT, 196, &[768], &small)?, Some("pingpong_128x192_x2"));
        Ok(())
    }

    #[test]
    fn without_clusters_the_same_tile_serves() -> Result<()> {
        let named = |tiles: &[&str], name| tiles.contains(&name);
        for tile in TILES.iter().filter(|tile| tile.cluster > 1) {
            let without = super::tile(tile.name.strip_suffix(X2).unwrap())?;
            assert_eq!(without, &Tile { name: without.name, cluster: 1, ..*tile });
            for tiles in [&FORWARD_TILES[..], &BACKWARD_TILES] {
                assert!(!named(tiles, tile.name) || named(tiles, without.name), "{}", tile.name);
            }
        }
        let projections = [ProjectionProblem { out_dim: 768, bias: true, lora: None }];
        let activation = Activation::Identity;
        let problem = Problem { rows: 4096, in_dim: 768, projections: &projections, activation };
        let name = |clusters| {
            let gpu = Gpu { clusters, ..Gpu::H100 };
            chosen(FORWARD, &problem, DType::BF16, &[768], &gpu)
        };
        assert_eq!(name(true)?, Some("pingpong_128x192_x2"));
        assert_eq!(name(false)?, Some("pingpong_128x192"));
        Ok(())
    }

    #[test]
    fn a_launch_carries_the_maps_of_what_is_there() -> Result<()> {
        let lora = LoraProblem { rank: 16, scaling: 1.0, dropout: None, bias: false };
        let part = |lora| ProjectionProblem { out_dim: 192, bias: true, lora };
        let parts = [part(Some(lora)), part(None), part(Some(lora))];
        let activation = Activation::Identity;
        let problem = Problem { rows: 1000, in_dim: 64, projections: &parts, activation };
        let operands = ForwardOperands {
            x: 256,
            weights: &[512, 768, 1024],
            small: Small::Flat(2048),
            residual: 0,
            out: 4096,
            low_rank: 8192,
            sum: 0,
        };
        let five = Gpu { multiprocessors: 5, ..Gpu::H100 };
        let forward = |problem: &Problem<'_>, dtype, operands: &ForwardOperands<'_>| {
            forward_with(FORWARD_TILES[0], problem, dtype, operands, &five)
        };
        let launches = forward(&problem, DType::F16, &operands)?.unwrap();
        let [s, out] = &launches[..] else { panic!("{}", launches.len()) };
        assert_eq!(s.kernel, "low_rank_input_64x16_f16");
        assert_eq!(out.kernel, "projection_fwd_sm90_pingpong_128x192_f16");
        assert_eq!(out.grid, [5, 1, 1]);
        // x; three weights and outputs; S and b of two.
        assert_eq!(out.tensor_maps.len(), 1 + 3 + 3 + 4);
        let end = |(start, _): &(usize, TensorMap)| start + 128;
        assert!(out.tensor_maps.iter().map(end).max() <= Some(out.params.len()));
        // k begins 192 columns into the weight's rows' outputs, in a map of its own.
        let (_, k) = &out.tensor_maps[5];
        assert_eq!((k.address, k.dims.as_slice()), (768, &[64, 192][..]));

        // A cluster of two loads the weights, and b, in halves, and is there as a whole.
        let launches = forward_with("pingpong_128x192_x2", &problem, DType::F16, &operands, &five)?;
        let in_clusters = &launches.unwrap()[1];
        assert_eq!(in_clusters.kernel, "projection_fwd_sm90_pingpong_128x192_x2_f16");
        assert_eq!((out.cluster, in_clusters.cluster, in_clusters.grid), (1, 2, [4, 1, 1]));
        let tiles = |launch: &Launch| launch.tensor_maps.iter().map(|m| m.1.tile[1]).collect();
        let (whole, halves): (Vec<_>, Vec<_>) = (tiles(out), tiles(in_clusters));
        assert_eq!(
            (&whole[..4], &halves[..4]),
            (&[128, 192, 128, 192][..], &[128, 96, 128, 96][..])
        );

        // What bulk copies do not take.
        for operands in [
            ForwardOperands { x: 264, ..operands },
            ForwardOperands { out: 4104, ..operands },
            ForwardOperands { small: Small::Flat(2052), ..operands },
        ] {
            assert!(forward(&problem, DType::F16, &operands)?.is_none());
        }
        assert!(forward(&problem, DType::F32, &operands)?.is_none());
        let odd = Problem { in_dim: 63, ..problem };
        assert!(forward(&odd, DType::F16, &operands)?.is_none());
        // Rows that a coordinate counts, and one more.
        let long = |rows| Problem { rows, ..problem };
        assert!(forward(&long((1 << 31) - 1), DType::F16, &operands)?.is_some());
        assert!(forward(&long(1 << 31), DType::F16, &operands)?.is_none());
        Ok(())
    }
}
