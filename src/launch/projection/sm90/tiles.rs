//! The tiles of the projections' kernels for Hopper (`kernels/tiles.h`), and which one a problem gets.

use crate::launch::tile_table::{PROJECTION_BWD_INPUT_SM90, PROJECTION_FWD_SM90};
use crate::launch::tiles::Forced;
use crate::launch::Gpu;

pub use super::tile::{Schedule, Tile};

/// The kernels that have tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `projection_fwd_sm90`
    Forward,
    /// `projection_bwd_input_sm90`, the gradient of x.
    BackwardInput,
}

impl Pass {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Forward, Self::BackwardInput];

    /// The first part of the kernels' names.
    pub fn kernel(self) -> &'static str {
        match self {
            Self::Forward => "projection_fwd_sm90",
            Self::BackwardInput => "projection_bwd_input_sm90",
        }
    }

    /// All of its tiles.
    pub fn tiles(self) -> &'static [Tile] {
        match self {
            Self::Forward => PROJECTION_FWD_SM90,
            Self::BackwardInput => PROJECTION_BWD_INPUT_SM90,
        }
    }

    /// The tiles that problems get on a GPU with or without clusters.
    pub fn tiles_in_use(self, clusters: bool) -> impl Iterator<Item = &'static Tile> {
        let cluster = if clusters { 2 } else { 1 };
        [PING_PONG, COOPERATIVE].into_iter().filter_map(move |kind| self.find(kind, cluster))
    }

    fn forced(self, forced: &Forced) -> Option<&'static Tile> {
        match self {
            Self::Forward => forced.projection_forward,
            Self::BackwardInput => forced.projection_backward,
        }
    }

    fn find(self, (schedule, cols): Kind, cluster: u32) -> Option<&'static Tile> {
        let same =
            |tile: &&Tile| (tile.schedule, tile.cols, tile.cluster) == (schedule, cols, cluster);
        self.tiles().iter().find(same)
    }
}

/// A tile, whatever its cluster.
type Kind = (Schedule, u32);
/// For widths of ViT-L and ViT-H, which tiles of 192 do not fill. A step of 64 of depth takes `rows cols / 32` cycles
/// of the tensor cores and `128 (rows + cols / cluster)` bytes from the L2 cache. That is 32 bytes a cycle, without a
/// cluster
/// 48. The gradient of x costs 245 to 262 cycles a column with LoRA, against 216 in ping-pong tiles. ViT-L fills 5.3 of
/// 6 of those. Without LoRA, as in most linears, it costs 204.
const COOPERATIVE: Kind = (Schedule::Cooperative, 256);
/// For the rest: 37 bytes a cycle, without a cluster 53, and an epilogue that costs nothing. A tile of ViT-B's qkv has
/// products of 28 thousand cycles. Two masks and low-rank products take one warpgroup 24 thousand, beside the other's
/// products. All warps together would take 10 to 14 thousand before the next tile.
const PING_PONG: Kind = (Schedule::PingPong, 192);

/// The tile for an output of `rows` rows in these widths. Reckoned, not measured: none where there would be fewer tiles
/// than for every other multiprocessor, since smaller portable ones are faster then.
pub fn pick(pass: Pass, rows: u64, widths: &[u32], gpu: &Gpu) -> Option<&'static Tile> {
    if let Some(tile) = pass.forced(&gpu.forced) {
        return Some(tile);
    }
    let filled = |cols| widths.iter().all(|width| width.is_multiple_of(cols));
    let wide = filled(COOPERATIVE.1) && !filled(PING_PONG.1);
    let kinds = [wide.then_some(COOPERATIVE), Some(PING_PONG)];
    let busy = |&kind: &Kind| {
        let tile = pass.find(kind, 2);
        tile.is_some_and(|tile| 4 * tile.count(rows, widths) >= gpu.persistent_blocks())
    };
    let kind = kinds.into_iter().flatten().find(busy)?;
    pass.find(kind, if gpu.clusters { 2 } else { 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiles_serve_sams_linears() {
        let name = |pass, rows, widths: &[u32]| {
            pick(pass, rows, widths, &Gpu::H100).map_or("", |tile| tile.name)
        };
        // One image through ViT-B, L and H: qkv, proj, lin1.
        for (width, expected) in [
            (768, "pingpong_128x192_x2"),
            (1024, "cooperative_128x256_x2"),
            (1280, "cooperative_128x256_x2"),
            // Both widths fit lin1 of ViT-B.
            (3072, "pingpong_128x192_x2"),
            (1000, "pingpong_128x192_x2"),
        ] {
            assert_eq!(name(Pass::Forward, 4096, &[width; 3]), expected);
            // x of the same: of lin2 it is as wide as the output of lin1.
            for pass in Pass::ALL {
                assert_eq!(name(pass, 4096, &[width]), expected);
            }
        }
        assert_eq!(name(Pass::Forward, 196, &[768; 3]), "");
        assert_eq!(name(Pass::BackwardInput, 196, &[768]), "");
        // Tiles for every other multiprocessor, however many there are.
        let small = Gpu { multiprocessors: 14, ..Gpu::H100 };
        assert!(pick(Pass::BackwardInput, 196, &[768], &small).is_some());
        // A forced tile serves any problem.
        for tile in Pass::Forward.tiles() {
            let forced = Forced { projection_forward: Some(tile), ..Forced::NONE };
            let gpu = Gpu { forced, ..Gpu::H100 };
            assert_eq!(pick(Pass::Forward, 196, &[768], &gpu), Some(tile));
        }
    }

    #[test]
    fn without_clusters_the_same_tile_serves() {
        let alone = Gpu { clusters: false, ..Gpu::H100 };
        for pass in Pass::ALL {
            for tile in pass.tiles().iter().filter(|tile| tile.cluster > 1) {
                let without = Tile { cluster: 1, name: tile.name.trim_end_matches("_x2"), ..*tile };
                assert!(pass.tiles().contains(&without), "{tile:?}");
            }
            assert_eq!(pick(pass, 4096, &[768], &alone).unwrap().name, "pingpong_128x192");
            assert_eq!(pass.tiles_in_use(true).count(), 2);
            assert!(pass.tiles_in_use(false).all(|tile| tile.cluster == 1));
        }
    }
}
