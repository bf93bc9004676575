//! The tiles of the attention's kernels for Hopper (`kernels/tiles.h`), and which ones a problem gets.

use crate::launch::rel_pos_attention::sm90::tile::SHARED_BYTES;
use crate::launch::rel_pos_attention::tiles::by_width;
use crate::launch::tile_table::{
    ATTENTION_BWD_KEY_SM90, ATTENTION_BWD_QUERY_SM90, ATTENTION_FWD_SM90, ATTENTION_WINDOW_SM90,
};
use crate::launch::AttentionProblem;

pub use super::tile::{KeyBlock, StreamTile, WindowTile};

/// The tiles of the forward and of the backward's two passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// The forward's.
    pub forward: &'static StreamTile,
    /// The query pass's.
    pub query: &'static StreamTile,
    /// The key pass's.
    pub key: &'static KeyBlock,
}

/// Columns of the key tiles for heads of so many channels; for self-tests and measurements.
pub fn widths(head_dim: usize) -> impl Iterator<Item = usize> {
    let of_head = ATTENTION_FWD_SM90.iter().filter(move |tile| tile.head_dim == head_dim);
    of_head.map(|tile| tile.cols)
}

/// The tiles of a problem, none for other heads. They are those of `cols` columns, if any are given and there are such;
/// else those whose stripes leave least of the window's width empty. The forward's is one whose biases fit in shared
/// memory.
pub fn pick(problem: &AttentionProblem, cols: Option<usize>) -> Option<Tiles> {
    let (head_dim, width) = (problem.head_dim, problem.side_w);
    let stream =
        |tiles: &'static [StreamTile]| tiles.iter().filter(move |tile| tile.head_dim == head_dim);
    let fitting =
        stream(ATTENTION_FWD_SM90).filter(|tile| tile.forward_bytes(problem) <= SHARED_BYTES);
    let of_key = ATTENTION_BWD_KEY_SM90.iter().filter(move |block| block.head_dim == head_dim);
    Some(Tiles {
        forward: by_width(fitting, width, cols, |tile| tile.cols)?,
        query: by_width(stream(ATTENTION_BWD_QUERY_SM90), width, cols, |tile| tile.cols)?,
        key: by_width(of_key, width, cols, |block| block.cols)?,
    })
}

/// The tile of windows with heads of so many channels.
pub fn window(head_dim: usize) -> Option<&'static WindowTile> {
    ATTENTION_WINDOW_SM90.iter().find(|tile| tile.head_dim == head_dim)
}

#[cfg(test)]
mod tests {
    use super::super::super::portable::tests::GLOBAL;
    use super::*;

    #[test]
    fn all_passes_have_the_width_that_leaves_least_empty_or_is_forced() {
        let cols = |side_w, forced| {
            let problem = AttentionProblem { side_w, ..GLOBAL };
            let Tiles { forward, query, key } = pick(&problem, forced).unwrap();
            assert_eq!([query.cols, key.cols], [forward.cols; 2]);
            forward.cols
        };
        let found = [64, 40, 48, 80, 14, 63].map(|width| cols(width, None));
        assert_eq!(found, [64, 40, 16, 16, 16, 64]);
        for width in widths(64) {
            assert_eq!(cols(64, Some(width)), width);
        }
        assert_eq!(pick(&AttentionProblem { head_dim: 32, ..GLOBAL }, None), None);
    }
}
