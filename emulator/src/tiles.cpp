// Prints src/launch/tile_table.rs: the tiles of kernels/tiles.h, and the shared memory that the kernels' own structs take.
#include <cstdio>
#include <string>

#include "low_rank/low_rank.cuh"
#include "multi_head/common.cuh"
#include "projection/common.cuh"
#include "projection/sm90/common.cuh"
#include "rel_pos_attention/bwd_key.cuh"
#include "rel_pos_attention/bwd_query.cuh"
#include "rel_pos_attention/sm90/bwd_key.cuh"
#include "rel_pos_attention/sm90/bwd_query.cuh"
#include "rel_pos_attention/sm90/window_bwd.cuh"
#include "rel_pos_attention/sm90/window_fwd.cuh"
#include "tiles.h"

// The host knows f16 and bf16 by their size alone, so that their rows are one. If the rows of all elements are equal,
// they are one too.
static std::string last;

static void begin(const char* name, const char* type) {
    last.clear();
    printf("\n#[rustfmt::skip]\npub const %s: &[%s] = &[\n", name, type);
}
static void end() { printf("];\n"); }

template <class... Numbers> static void row(const char* format, Numbers... numbers) {
    char text[512];
    snprintf(text, sizeof(text), format, numbers...);
    if (text != last) printf("    %s,\n", text);
    last = text;
}

static std::string capitalised(std::string word) {
    word[0] = char(toupper(word[0]));
    return word;
}

#define ATTENTION(suffix, T, dim, cols, rows, warps, parts)                                              \
    row("attention::Tile { element_bytes: %zu, head_dim: %d, cols: %d, rows: %d, warps: %d, parts: %d, " \
        "forward_bytes: %zu, backward_bytes: %zu }",                                                     \
        sizeof(T), dim, cols, rows, warps, parts,                                                        \
        sizeof(AttentionTile<T, dim, cols / parts, rows * parts, warps>::Storage),                       \
        sizeof(QueryPassShared<AttentionTile<T, dim, cols, rows, warps>>));
#define ATTENTION_KEY(suffix, T, dim, queries)                                 \
    row("attention::KeyTile { element_bytes: %zu, head_dim: %d, bytes: %zu }", \
        sizeof(T), dim, sizeof(KeyTile<T, dim, queries>::Storage));

template <class Tile> static void stream(size_t bytes) {
    row("attention_sm90::StreamTile { head_dim: %d, cols: %d, rows: %d, box_rows: %d, queries: %d, threads: %d, "
        "bytes: %zu }",
        Tile::kDim, Tile::kCols, Tile::kRows, Tile::kBoxRows, Tile::kQueries, Tile::kThreads, bytes);
}
template <class Tile> static void stream_forward() { stream<Tile>(sizeof(typename Tile::Storage)); }
template <class Tile> static void stream_query_pass() { stream<Tile>(sizeof(QueryPassStorage<Tile>)); }
#define ATTENTION_FWD_SM90(suffix, T, dim, cols, rows, box_rows, slots, groups) \
    stream_forward<StreamTile<T, dim, cols, rows, box_rows, slots, groups>>();
#define ATTENTION_BWD_QUERY_SM90(suffix, T, dim, cols, rows, box_rows, slots, groups) \
    stream_query_pass<StreamTile<T, dim, cols, rows, box_rows, slots, groups>>();
#define ATTENTION_BWD_KEY_SM90(suffix, T, dim, cols)                                  \
    row("attention_sm90::KeyBlock { head_dim: %d, cols: %d, bytes: %zu }", dim, cols, \
        sizeof(KeyBlock<T, dim, cols, true>::Storage));
#define ATTENTION_WINDOW_SM90(suffix, T, dim)                                                        \
    row("attention_sm90::WindowTile { head_dim: %d, forward_bytes: %zu, backward_bytes: %zu }", dim, \
        sizeof(WindowForwardStorage<WindowTile<T, dim>>), sizeof(WindowBackwardStorage<WindowTile<T, dim>>));

#define MULTI_HEAD(suffix, T, dim, rows, columns)                                                                   \
    row("multi_head::Tile { element_bytes: %zu, head_dim: %d, rows: %d, columns: %d, forward_bytes: %zu, "         \
        "backward_bytes: %zu }",                                                                                   \
        sizeof(T), dim, rows, columns, sizeof(MultiHeadTile<T, dim, rows, columns>::ForwardStorage),               \
        sizeof(MultiHeadTile<T, dim, rows, columns>::BackwardStorage));

#define PROJECTION(suffix, T, rows, cols, warps_m, warps_n)                                                    \
    row("projection::Tile { rows: %d, cols: %d, threads: %d, forward_bytes: %zu, backward_bytes: %zu }", rows, \
        cols, 32 * warps_m * warps_n, sizeof(ProjectionTile<T, rows, cols, warps_m, warps_n, false>::Storage), \
        sizeof(ProjectionTile<T, rows, cols, warps_m, warps_n, true>::Storage));
#define PROJECTION_SM90(suffix, T, tile, ping_pong, rows, cols, stages, cluster)                                 \
    row("projection_sm90::Tile { name: \"" #tile "\", schedule: Schedule::%s, rows: %d, cols: %d, cluster: %d, " \
        "bytes: %zu }",                                                                                          \
        ping_pong ? "PingPong" : "Cooperative", rows, cols, cluster,                                             \
        sizeof(ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>::Storage));
#define LOW_RANK(suffix, T, product, cols, warps_m, warps_n, left_columns, right_rows)    \
    row("LowRankTile { product: Product::%s, cols: %d, element_bytes: %zu, bytes: %zu }", \
        capitalised(#product).c_str(), cols, sizeof(T),                                   \
        sizeof(LowRankTile<T, cols, warps_m, warps_n, left_columns, right_rows>::Storage));

#define TABLE(name, type, rows, print) \
    begin(#name, type);                \
    rows(print) end();

int main() {
    printf(
        "// Made from kernels/tiles.h by scripts/bindings.sh; not edited by hand.\n\n"
        "use super::multi_head::tile as multi_head;\n"
        "use super::projection::sm90::tile::{self as projection_sm90, Schedule};\n"
        "use super::projection::tile::{self as projection, LowRankTile, Product};\n"
        "use super::rel_pos_attention::sm90::tile as attention_sm90;\n"
        "use super::rel_pos_attention::tile as attention;\n");
    TABLE(ATTENTION, "attention::Tile", REL_POS_ATTENTION_TILES, ATTENTION)
    TABLE(ATTENTION_KEY, "attention::KeyTile", REL_POS_ATTENTION_BWD_KEY_TILES, ATTENTION_KEY)
    TABLE(ATTENTION_FWD_SM90, "attention_sm90::StreamTile", REL_POS_ATTENTION_FWD_SM90_TILES, ATTENTION_FWD_SM90)
    TABLE(ATTENTION_BWD_QUERY_SM90, "attention_sm90::StreamTile", REL_POS_ATTENTION_BWD_QUERY_SM90_TILES,
          ATTENTION_BWD_QUERY_SM90)
    TABLE(ATTENTION_BWD_KEY_SM90, "attention_sm90::KeyBlock", REL_POS_ATTENTION_BWD_KEY_SM90_TILES, ATTENTION_BWD_KEY_SM90)
    TABLE(ATTENTION_WINDOW_SM90, "attention_sm90::WindowTile", REL_POS_ATTENTION_WINDOW_SM90_TILES, ATTENTION_WINDOW_SM90)
    TABLE(MULTI_HEAD, "multi_head::Tile", MULTI_HEAD_TILES, MULTI_HEAD)
    TABLE(PROJECTION, "projection::Tile", PROJECTION_TILES, PROJECTION)
    TABLE(PROJECTION_FWD_SM90, "projection_sm90::Tile", PROJECTION_FWD_SM90_TILES, PROJECTION_SM90)
    TABLE(PROJECTION_BWD_INPUT_SM90, "projection_sm90::Tile", PROJECTION_BWD_INPUT_SM90_TILES, PROJECTION_SM90)
    TABLE(LOW_RANK, "LowRankTile", LOW_RANK_TILES, LOW_RANK)
}
