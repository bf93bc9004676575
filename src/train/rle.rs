//! Masks as COCO writes them: lengths of runs down the columns, background and object in turns, background first.
//!
//! ```text
//! runs        [n0, n1, n2, ..]                 their sum is height * width
//! compressed  each number, or its difference to the one before last, in groups of 5 bits from the lowest: a character
//!             is 48 + group + 32 if more follow; bit 16 of the last group is the sign
//! polygon     its outline, drawn five times as fine; a column's runs change where it crosses the column's middle
//! ```
//! Source: `maskApi.c` of pycocotools, whose masks these are, pixel for pixel.

/// Lengths of runs.
pub(super) type Runs = Vec<u32>;

/// Height and width.
pub(super) type Size = (u32, u32);

/// How much finer than pixels outlines are drawn.
const SCALE: f64 = 5.0;

/// Outlines may lie outside of their image by its side and so many pixels.
const MARGIN: f64 = 1000.0;

/// Runs as they are, if they fill the mask.
pub(super) fn checked(runs: Runs, (height, width): Size) -> Result<Runs, String> {
    let expected = u64::from(height) * u64::from(width);
    let found: u64 = runs.iter().map(|run| u64::from(*run)).sum();
    match found == expected {
        true => Ok(runs),
        false => Err(format!("its runs hold {found} pixels, the image {expected}")),
    }
}

/// Runs from their compressed form.
pub(super) fn decompressed(text: &str, size: Size) -> Result<Runs, String> {
    let mut runs: Runs = Vec::new();
    let mut characters = text.bytes();
    while let Some(mut character) = characters.next() {
        let (mut number, mut shift) = (0i64, 0);
        loop {
            let group = match character {
                48..=111 => i64::from(character - 48),
                other => {
                    return Err(format!("{:?} does not belong into counts", char::from(other)))
                }
            };
            // Seven groups hold 35 bits, more than any run has.
            if shift > 30 {
                return Err("a count has more than 7 characters".into());
            }
            number |= (group & 31) << shift;
            shift += 5;
            if group & 32 == 0 {
                if group & 16 != 0 {
                    number -= 1 << shift;
                }
                break;
            }
            character = characters.next().ok_or("the counts end within a number")?;
        }
        if let (true, Some(before)) = (runs.len() > 2, runs.len().checked_sub(2)) {
            number += i64::from(runs[before]);
        }
        runs.push(u32::try_from(number).map_err(|_| format!("a count is {number}"))?);
    }
    checked(runs, size)
}

/// The runs of a polygon `[x0, y0, x1, y1, ..]`.
pub(super) fn polygon(xy: &[f64], (height, width): Size) -> Result<Runs, String> {
    if xy.len() < 6 || !xy.len().is_multiple_of(2) {
        let message = "a polygon needs 6 numbers at least, an even count of them, and has";
        return Err(format!("{message} {}", xy.len()));
    }
    // Far outside nothing is drawn, but outlines there would take time.
    let within = |value: f64, side: u32| {
        let (side, margin) = (f64::from(side), f64::from(side) + MARGIN);
        value >= -margin && value <= side + margin
    };
    for point in xy.chunks_exact(2) {
        if !(within(point[0], width) && within(point[1], height)) {
            return Err(format!(
                "the point {point:?} of a polygon is far outside of its image of {width} x {height} pixels"
            ));
        }
    }
    let pixels = u64::from(height) * u64::from(width);
    let fine = |value: f64| (SCALE * value + 0.5) as i64;
    let mut points = xy.chunks_exact(2).map(|point| (fine(point[0]), fine(point[1])));
    let points: Vec<(i64, i64)> = points.by_ref().collect();
    let edges = || points.iter().zip(points.iter().cycle().skip(1));
    let length: u64 = edges().map(|(a, b)| a.0.abs_diff(b.0).max(a.1.abs_diff(b.1)) + 1).sum();
    // A line in every row of pixels makes five to the pixel.
    if length > 8 * pixels + (1 << 20) {
        return Err(format!("a polygon's outline of {length} fifths of a pixel is no outline"));
    }
    let (mut crossings, mut last) = (Vec::new(), None);
    for (from, to) in edges() {
        outline(*from, *to, |x, y| {
            if let Some((x0, y0)) = last.replace((x, y)).filter(|(x0, _)| *x0 != x) {
                crossings.extend(crossing((x0, y0), (x, y), (height, width)));
            }
        });
    }
    crossings.push(pixels);
    crossings.sort_unstable();
    // Differences; two crossings at one place undo each other.
    let mut lengths = Vec::with_capacity(crossings.len());
    let mut before = 0;
    for place in crossings {
        lengths.push((place - before) as u32);
        before = place;
    }
    let mut runs: Runs = Vec::with_capacity(lengths.len());
    let mut lengths = lengths.into_iter();
    runs.extend(lengths.next());
    while let Some(length) = lengths.next() {
        match (length, runs.last_mut()) {
            (0, Some(run)) => *run += lengths.next().unwrap_or(0),
            _ => runs.push(length),
        }
    }
    Ok(runs)
}

/// The points of a straight line, both ends included, in order.
fn outline(from: (i64, i64), to: (i64, i64), mut point: impl FnMut(i64, i64)) {
    let (dx, dy) = (to.0.abs_diff(from.0) as i64, to.1.abs_diff(from.1) as i64);
    let flip = (dx >= dy && from.0 > to.0) || (dx < dy && from.1 > to.1);
    let ((xs, ys), (xe, ye)) = if flip { (to, from) } else { (from, to) };
    let slope = if dx >= dy { (ye - ys) as f64 / dx as f64 } else { (xe - xs) as f64 / dy as f64 };
    for step in 0..=dx.max(dy) {
        let t = if flip { dx.max(dy) - step } else { step };
        // A line of one point has no slope, and its other coordinate is never looked at.
        if dx >= dy {
            point(t + xs, (ys as f64 + slope * t as f64 + 0.5) as i64);
        } else {
            point((xs as f64 + slope * t as f64 + 0.5) as i64, t + ys);
        }
    }
}

/// Where the outline crosses the middle of a column between two of its points, as a place in the columns.
fn crossing(a: (i64, i64), b: (i64, i64), (height, width): Size) -> Option<u64> {
    let x = (if b.0 < a.0 { b.0 } else { b.0 - 1 }) as f64;
    let x = (x + 0.5) / SCALE - 0.5;
    if x.floor() != x || x < 0.0 || x > f64::from(width) - 1.0 {
        return None;
    }
    let y = (b.1.min(a.1) as f64 + 0.5) / SCALE - 0.5;
    let y = y.clamp(0.0, f64::from(height)).ceil();
    Some(x as u64 * u64::from(height) + y as u64)
}

/// The places of the pixels of some runs together in rows, in ascending order.
pub(super) fn pixels(objects: &[Runs], (height, width): Size) -> Vec<usize> {
    let (height, width) = (height as usize, width as usize);
    let mut places = vec![];
    for runs in objects {
        let mut place = 0;
        for (index, run) in runs.iter().enumerate() {
            let end = place + *run as usize;
            if index % 2 == 1 {
                let inside =
                    (place..end.min(height * width)).map(|p| p % height * width + p / height);
                places.extend(inside);
            }
            place = end;
        }
    }
    places.sort_unstable();
    places.dedup();
    places
}
