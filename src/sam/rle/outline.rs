//! Polygons of a mask along the edges of its pixels.
//!
//! ```text
//! edges     directed, the object on the side of growing x and y where the edge runs to growing x
//! walk      from edge to edge; where two pixels touch at a corner alone, around the same pixel
//! rings     a walk is cut where it meets itself, so that no ring visits a corner twice
//! polygon   the outer ring of a 4-connected part, its area positive; then its holes, theirs negative
//! ```
//! The rings give the mask back exactly: a pixel belongs to it if its centre lies in an odd number of them.

use super::columns::Piece;
use super::Rle;
use std::collections::{BTreeMap, HashMap};

/// Corners of pixels `[x, y]`; the last equals the first.
///
/// [Example](crate::sam::Rle::polygons)
pub type Ring = Vec<[u32; 2]>;

/// A 4-connected part of a mask: its outer ring, then the rings of its holes.
///
/// [Example](crate::sam::Rle::polygons)
pub type Polygon = Vec<Ring>;

/// The edges that leave a corner, by direction: to growing x, to growing y, and back.
type Edges = BTreeMap<[u32; 2], [Option<[u32; 2]>; 4]>;

impl Rle {
    /// The mask as polygons along the edges of its pixels, in pixels of the image; pixel (x, y) is the square from
    /// `[x, y]` to `[x + 1, y + 1]`.
    ///
    /// The shoelace formula over `[x, y]` is positive for outer rings and negative for holes, as in RFC 7946. No ring
    /// visits a corner twice.
    ///
    /// ```
    /// use candle_sam_lora::sam::Rle;
    ///
    /// # fn main() -> candle_sam_lora::Result<()> {
    /// let mask = Rle::from_mask(&[true, true, false, true, false, false], (2, 3))?;
    /// assert_eq!(mask.polygons(), [[[[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2], [0, 0]]]]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn polygons(&self) -> Vec<Polygon> {
        let pieces: Vec<Piece> = self.pieces().collect();
        let parts = parts(&pieces);
        let mut edges = edges(&pieces);
        let mut polygons: BTreeMap<usize, Polygon> = BTreeMap::new();
        while let Some((start, direction)) = first(&edges) {
            let (x, y) = pixel(start, direction);
            let piece = touching(&pieces, Some(x), (y, y + 1)).start;
            let rings = walk(&mut edges, start, direction);
            polygons.entry(parts[piece]).or_default().extend(rings);
        }
        let mut polygons: Vec<Polygon> = polygons.into_values().collect();
        polygons.iter_mut().for_each(|rings| rings.sort_by_key(|ring| doubled_area(ring) < 0));
        polygons
    }
}

/// The pieces of column `x` that share a row with `rows`.
fn touching(pieces: &[Piece], x: Option<u32>, rows: (u32, u32)) -> std::ops::Range<usize> {
    let Some(x) = x else { return 0..0 };
    let start = pieces.partition_point(|piece| (piece.0, piece.2) <= (x, rows.0));
    start..pieces.partition_point(|piece| (piece.0, piece.1) < (x, rows.1)).max(start)
}

/// The 4-connected part of each piece, by the first piece of the part.
fn parts(pieces: &[Piece]) -> Vec<usize> {
    fn root(of: &mut [usize], mut piece: usize) -> usize {
        while of[piece] != piece {
            of[piece] = of[of[piece]];
            piece = of[piece];
        }
        piece
    }
    let mut of: Vec<usize> = (0..pieces.len()).collect();
    for (index, &(x, y0, y1)) in pieces.iter().enumerate() {
        for neighbour in touching(pieces, x.checked_sub(1), (y0, y1)) {
            let (a, b) = (root(&mut of, index), root(&mut of, neighbour));
            of[a.max(b)] = a.min(b);
        }
    }
    (0..of.len()).map(|piece| root(&mut of, piece)).collect()
}

/// All edges between the object and the rest. A vertical one is as long as its neighbours allow.
fn edges(pieces: &[Piece]) -> Edges {
    let mut edges = Edges::new();
    let mut add = |from, direction: usize, to| {
        edges.entry(from).or_default()[direction] = Some(to);
    };
    for &(x, y0, y1) in pieces {
        add([x, y0], 0, [x + 1, y0]);
        add([x + 1, y1], 2, [x, y1]);
        for (column, side) in [(x.checked_sub(1), x), (Some(x + 1), x + 1)] {
            let mut top = y0;
            let beside = pieces[touching(pieces, column, (y0, y1))].iter().map(|p| (p.1, p.2));
            for (from, to) in beside.chain([(y1, y1)]) {
                if top < from && side == x {
                    add([side, from], 3, [side, top]);
                } else if top < from {
                    add([side, top], 1, [side, from]);
                }
                top = to;
            }
        }
    }
    edges
}

/// The first corner that an edge leaves, and the edge's direction.
fn first(edges: &Edges) -> Option<([u32; 2], usize)> {
    let (corner, leaving) = edges.first_key_value()?;
    Some((*corner, leaving.iter().position(Option::is_some)?))
}

/// The object's pixel beside an edge.
fn pixel([x, y]: [u32; 2], direction: usize) -> (u32, u32) {
    match direction {
        0 => (x, y),
        1 => (x - 1, y),
        2 => (x - 1, y - 1),
        _ => (x, y - 1),
    }
}

/// Takes an edge that leaves a corner: around the same pixel if there is one, else straight on, else the other way.
fn take(edges: &mut Edges, corner: [u32; 2], direction: usize) -> Option<(usize, [u32; 2])> {
    let leaving = edges.get_mut(&corner)?;
    let turns = [1, 0, 3].map(|turn| (direction + turn) % 4);
    let chosen = turns.into_iter().find(|direction| leaving[*direction].is_some())?;
    let next = leaving[chosen].take()?;
    if leaving.iter().all(Option::is_none) {
        edges.remove(&corner);
    }
    Some((chosen, next))
}

/// The rings of the walk from a corner back to it, whose first edge has a direction. It is the only edge left there,
/// for another would belong to a pixel further left.
fn walk(edges: &mut Edges, start: [u32; 2], direction: usize) -> Vec<Ring> {
    let (mut rings, mut path) = (vec![], Ring::new());
    let mut places: HashMap<[u32; 2], usize> = HashMap::new();
    let (mut corner, mut direction) = (start, direction);
    loop {
        if let Some(place) = places.get(&corner).copied() {
            let ring: Ring = path.drain(place..).collect();
            ring.iter().for_each(|corner| _ = places.remove(corner));
            rings.push(closed(&ring));
            if path.is_empty() {
                return rings;
            }
        }
        places.insert(corner, path.len());
        path.push(corner);
        match take(edges, corner, direction) {
            Some((chosen, next)) => (direction, corner) = (chosen, next),
            None => return rings,
        }
    }
}

/// A ring without the corners that its sides run through.
fn closed(ring: &[[u32; 2]]) -> Ring {
    let count = ring.len();
    let turns = (0..count).filter(|index| {
        let (before, after) = (ring[(index + count - 1) % count], ring[(index + 1) % count]);
        before[0] != after[0] && before[1] != after[1]
    });
    let mut corners: Ring = turns.map(|index| ring[index]).collect();
    corners.extend(corners.first().copied());
    corners
}

/// Twice the area of a closed ring, positive if growing x turns to growing y.
fn doubled_area(ring: &[[u32; 2]]) -> i64 {
    let cross = |a: [u32; 2], b: [u32; 2]| {
        i64::from(a[0]) * i64::from(b[1]) - i64::from(b[0]) * i64::from(a[1])
    };
    ring.windows(2).map(|pair| cross(pair[0], pair[1])).sum()
}
