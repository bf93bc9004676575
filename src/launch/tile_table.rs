// Made from kernels/tiles.h by scripts/bindings.sh; not edited by hand.

use super::multi_head::tile as multi_head;
use super::projection::sm90::tile::{self as projection_sm90, Schedule};
use super::projection::tile::{self as projection, LowRankTile, Product};
use super::rel_pos_attention::sm90::tile as attention_sm90;
use super::rel_pos_attention::tile as attention;

#[rustfmt::skip]
pub const ATTENTION: &[attention::Tile] = &[
    attention::Tile { element_bytes: 2, head_dim: 64, cols: 64, rows: 1, warps: 4, parts: 2, forward_bytes: 36864, backward_bytes: 36864 },
    attention::Tile { element_bytes: 2, head_dim: 80, cols: 64, rows: 1, warps: 4, parts: 1, forward_bytes: 45056, backward_bytes: 45056 },
    attention::Tile { element_bytes: 2, head_dim: 16, cols: 16, rows: 4, warps: 7, parts: 1, forward_bytes: 12288, backward_bytes: 12288 },
    attention::Tile { element_bytes: 2, head_dim: 32, cols: 16, rows: 4, warps: 7, parts: 1, forward_bytes: 20480, backward_bytes: 20480 },
    attention::Tile { element_bytes: 2, head_dim: 64, cols: 16, rows: 4, warps: 7, parts: 1, forward_bytes: 36864, backward_bytes: 36864 },
    attention::Tile { element_bytes: 2, head_dim: 80, cols: 16, rows: 4, warps: 7, parts: 1, forward_bytes: 45056, backward_bytes: 45056 },
    attention::Tile { element_bytes: 2, head_dim: 64, cols: 40, rows: 2, warps: 4, parts: 1, forward_bytes: 46080, backward_bytes: 46080 },
    attention::Tile { element_bytes: 2, head_dim: 80, cols: 40, rows: 2, warps: 4, parts: 1, forward_bytes: 56320, backward_bytes: 56320 },
    attention::Tile { element_bytes: 4, head_dim: 16, cols: 16, rows: 2, warps: 4, parts: 1, forward_bytes: 12288, backward_bytes: 24576 },
    attention::Tile { element_bytes: 4, head_dim: 32, cols: 16, rows: 2, warps: 4, parts: 1, forward_bytes: 20480, backward_bytes: 40960 },
    attention::Tile { element_bytes: 4, head_dim: 64, cols: 16, rows: 2, warps: 4, parts: 1, forward_bytes: 36864, backward_bytes: 73728 },
    attention::Tile { element_bytes: 4, head_dim: 80, cols: 16, rows: 2, warps: 4, parts: 1, forward_bytes: 45056, backward_bytes: 90112 },
];

#[rustfmt::skip]
pub const ATTENTION_KEY: &[attention::KeyTile] = &[
    attention::KeyTile { element_bytes: 2, head_dim: 16, bytes: 25088 },
    attention::KeyTile { element_bytes: 2, head_dim: 32, bytes: 33280 },
    attention::KeyTile { element_bytes: 2, head_dim: 64, bytes: 49664 },
    attention::KeyTile { element_bytes: 2, head_dim: 80, bytes: 57856 },
    attention::KeyTile { element_bytes: 4, head_dim: 16, bytes: 31744 },
    attention::KeyTile { element_bytes: 4, head_dim: 32, bytes: 48128 },
    attention::KeyTile { element_bytes: 4, head_dim: 64, bytes: 80896 },
    attention::KeyTile { element_bytes: 4, head_dim: 80, bytes: 97280 },
];

#[rustfmt::skip]
pub const ATTENTION_FWD_SM90: &[attention_sm90::StreamTile] = &[
    attention_sm90::StreamTile { head_dim: 64, cols: 64, rows: 1, box_rows: 1, queries: 192, threads: 512, bytes: 74752 },
    attention_sm90::StreamTile { head_dim: 80, cols: 64, rows: 1, box_rows: 1, queries: 192, threads: 512, bytes: 93184 },
    attention_sm90::StreamTile { head_dim: 64, cols: 16, rows: 8, box_rows: 8, queries: 128, threads: 384, bytes: 115712 },
    attention_sm90::StreamTile { head_dim: 80, cols: 16, rows: 8, box_rows: 8, queries: 128, threads: 384, bytes: 123904 },
    attention_sm90::StreamTile { head_dim: 64, cols: 40, rows: 4, box_rows: 1, queries: 128, threads: 384, bytes: 119808 },
    attention_sm90::StreamTile { head_dim: 80, cols: 40, rows: 4, box_rows: 1, queries: 128, threads: 384, bytes: 123904 },
];

#[rustfmt::skip]
pub const ATTENTION_BWD_QUERY_SM90: &[attention_sm90::StreamTile] = &[
    attention_sm90::StreamTile { head_dim: 64, cols: 64, rows: 1, box_rows: 1, queries: 128, threads: 384, bytes: 100352 },
    attention_sm90::StreamTile { head_dim: 80, cols: 64, rows: 1, box_rows: 1, queries: 128, threads: 384, bytes: 124928 },
    attention_sm90::StreamTile { head_dim: 64, cols: 16, rows: 4, box_rows: 4, queries: 128, threads: 384, bytes: 100352 },
    attention_sm90::StreamTile { head_dim: 80, cols: 16, rows: 4, box_rows: 4, queries: 128, threads: 384, bytes: 124928 },
    attention_sm90::StreamTile { head_dim: 64, cols: 40, rows: 2, box_rows: 1, queries: 128, threads: 384, bytes: 86016 },
    attention_sm90::StreamTile { head_dim: 80, cols: 40, rows: 2, box_rows: 1, queries: 128, threads: 384, bytes: 96256 },
];

#[rustfmt::skip]
pub const ATTENTION_BWD_KEY_SM90: &[attention_sm90::KeyBlock] = &[
    attention_sm90::KeyBlock { head_dim: 64, cols: 64, bytes: 177152 },
    attention_sm90::KeyBlock { head_dim: 80, cols: 64, bytes: 201728 },
    attention_sm90::KeyBlock { head_dim: 64, cols: 16, bytes: 132096 },
    attention_sm90::KeyBlock { head_dim: 80, cols: 16, bytes: 156672 },
    attention_sm90::KeyBlock { head_dim: 64, cols: 40, bytes: 152576 },
    attention_sm90::KeyBlock { head_dim: 80, cols: 40, bytes: 177152 },
];

#[rustfmt::skip]
pub const ATTENTION_WINDOW_SM90: &[attention_sm90::WindowTile] = &[
    attention_sm90::WindowTile { head_dim: 64, forward_bytes: 191264, backward_bytes: 210048 },
    attention_sm90::WindowTile { head_dim: 80, forward_bytes: 231328, backward_bytes: 231104 },
];

#[rustfmt::skip]
pub const MULTI_HEAD: &[multi_head::Tile] = &[
    multi_head::Tile { element_bytes: 4, head_dim: 16, rows: 16, columns: 32, forward_bytes: 13824, backward_bytes: 16384 },
    multi_head::Tile { element_bytes: 2, head_dim: 16, rows: 16, columns: 32, forward_bytes: 6912, backward_bytes: 8704 },
    multi_head::Tile { element_bytes: 4, head_dim: 32, rows: 16, columns: 32, forward_bytes: 23040, backward_bytes: 26624 },
    multi_head::Tile { element_bytes: 2, head_dim: 32, rows: 16, columns: 32, forward_bytes: 11520, backward_bytes: 13824 },
    multi_head::Tile { element_bytes: 4, head_dim: 16, rows: 64, columns: 16, forward_bytes: 12288, backward_bytes: 18944 },
    multi_head::Tile { element_bytes: 2, head_dim: 16, rows: 64, columns: 16, forward_bytes: 6144, backward_bytes: 9728 },
    multi_head::Tile { element_bytes: 4, head_dim: 32, rows: 64, columns: 16, forward_bytes: 20480, backward_bytes: 31232 },
    multi_head::Tile { element_bytes: 2, head_dim: 32, rows: 64, columns: 16, forward_bytes: 10240, backward_bytes: 15872 },
    multi_head::Tile { element_bytes: 4, head_dim: 16, rows: 64, columns: 32, forward_bytes: 18432, backward_bytes: 25600 },
    multi_head::Tile { element_bytes: 2, head_dim: 16, rows: 64, columns: 32, forward_bytes: 9216, backward_bytes: 13312 },
    multi_head::Tile { element_bytes: 4, head_dim: 32, rows: 64, columns: 32, forward_bytes: 30720, backward_bytes: 41984 },
    multi_head::Tile { element_bytes: 2, head_dim: 32, rows: 64, columns: 32, forward_bytes: 15360, backward_bytes: 21504 },
];

#[rustfmt::skip]
pub const PROJECTION: &[projection::Tile] = &[
    projection::Tile { rows: 128, cols: 128, threads: 256, forward_bytes: 81920, backward_bytes: 75776 },
    projection::Tile { rows: 64, cols: 64, threads: 128, forward_bytes: 40960, backward_bytes: 38912 },
];

#[rustfmt::skip]
pub const PROJECTION_FWD_SM90: &[projection_sm90::Tile] = &[
    projection_sm90::Tile { name: "pingpong_128x192", schedule: Schedule::PingPong, rows: 128, cols: 192, cluster: 1, bytes: 196752 },
    projection_sm90::Tile { name: "pingpong_128x192_x2", schedule: Schedule::PingPong, rows: 128, cols: 192, cluster: 2, bytes: 196752 },
    projection_sm90::Tile { name: "cooperative_128x256", schedule: Schedule::Cooperative, rows: 128, cols: 256, cluster: 1, bytes: 213136 },
    projection_sm90::Tile { name: "cooperative_128x256_x2", schedule: Schedule::Cooperative, rows: 128, cols: 256, cluster: 2, bytes: 213136 },
];

#[rustfmt::skip]
pub const PROJECTION_BWD_INPUT_SM90: &[projection_sm90::Tile] = &[
    projection_sm90::Tile { name: "pingpong_128x192", schedule: Schedule::PingPong, rows: 128, cols: 192, cluster: 1, bytes: 196752 },
    projection_sm90::Tile { name: "pingpong_128x192_x2", schedule: Schedule::PingPong, rows: 128, cols: 192, cluster: 2, bytes: 196752 },
    projection_sm90::Tile { name: "cooperative_128x256", schedule: Schedule::Cooperative, rows: 128, cols: 256, cluster: 1, bytes: 213136 },
    projection_sm90::Tile { name: "cooperative_128x256_x2", schedule: Schedule::Cooperative, rows: 128, cols: 256, cluster: 2, bytes: 213136 },
    projection_sm90::Tile { name: "cooperative_128x192", schedule: Schedule::Cooperative, rows: 128, cols: 192, cluster: 1, bytes: 221344 },
];

#[rustfmt::skip]
pub const LOW_RANK: &[LowRankTile] = &[
    LowRankTile { product: Product::Input, cols: 16, element_bytes: 4, bytes: 34560 },
    LowRankTile { product: Product::Input, cols: 16, element_bytes: 2, bytes: 22272 },
    LowRankTile { product: Product::Input, cols: 64, element_bytes: 4, bytes: 55296 },
    LowRankTile { product: Product::Input, cols: 64, element_bytes: 2, bytes: 43008 },
    LowRankTile { product: Product::Grad, cols: 16, element_bytes: 4, bytes: 36864 },
    LowRankTile { product: Product::Grad, cols: 16, element_bytes: 2, bytes: 24576 },
    LowRankTile { product: Product::Grad, cols: 64, element_bytes: 4, bytes: 55296 },
    LowRankTile { product: Product::Grad, cols: 64, element_bytes: 2, bytes: 43008 },
    LowRankTile { product: Product::Weight, cols: 16, element_bytes: 4, bytes: 36864 },
    LowRankTile { product: Product::Weight, cols: 16, element_bytes: 2, bytes: 23040 },
    LowRankTile { product: Product::Weight, cols: 64, element_bytes: 4, bytes: 55296 },
    LowRankTile { product: Product::Weight, cols: 64, element_bytes: 2, bytes: 41472 },
];
