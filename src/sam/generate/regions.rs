//! Small holes filled and small islands removed.
//!
//! Source: `remove_small_regions` of segment-anything.

/// A mask of `width` columns without what is smaller than `least` pixels: holes first, then islands, of which the
/// largest stays in any case. None if nothing is so small. Parts are 8-connected.
pub(super) fn without_small(mask: &[bool], width: usize, least: usize) -> Option<Vec<bool>> {
    let filled = switched(mask, width, least, false);
    let cleaned = switched(filled.as_deref().unwrap_or(mask), width, least, true);
    cleaned.or(filled)
}

/// Switches the small parts of what has this value; none without such parts.
fn switched(mask: &[bool], width: usize, least: usize, value: bool) -> Option<Vec<bool>> {
    let parts = parts(mask, width, value);
    let mut small: Vec<&Vec<usize>> = parts.iter().filter(|part| part.len() < least).collect();
    if small.is_empty() {
        return None;
    }
    if value && small.len() == parts.len() {
        let largest = small.iter().map(|part| part.len()).max();
        // The first of the largest.
        if let Some(place) = small.iter().position(|part| Some(part.len()) == largest) {
            small.remove(place);
        }
    }
    let mut mask = mask.to_vec();
    small.into_iter().flatten().for_each(|place| mask[*place] = !value);
    Some(mask)
}

/// The 8-connected parts of what has this value, in reading order of their first pixels.
fn parts(mask: &[bool], width: usize, value: bool) -> Vec<Vec<usize>> {
    let height = mask.len() / width.max(1);
    let mut seen = vec![false; mask.len()];
    let mut parts = vec![];
    for start in 0..mask.len() {
        if mask[start] != value || std::mem::replace(&mut seen[start], true) {
            continue;
        }
        let (mut part, mut next) = (vec![start], 0);
        while let Some(place) = part.get(next).copied() {
            next += 1;
            let (x, y) = (place % width, place / width);
            for row in y.saturating_sub(1)..=(y + 1).min(height - 1) {
                for column in x.saturating_sub(1)..=(x + 1).min(width - 1) {
                    let neighbour = row * width + column;
                    if mask[neighbour] == value && !std::mem::replace(&mut seen[neighbour], true) {
                        part.push(neighbour);
                    }
                }
            }
        }
        parts.push(part);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(text: &str) -> Vec<bool> {
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c == '#').collect()
    }

    #[test]
    fn holes_are_filled_and_islands_go() {
        let before = mask("####...  #.##..#  ####...  .......  #......");
        let after = mask("####...  ####...  ####...  .......  .......");
        assert_eq!(without_small(&before, 7, 3), Some(after));
        assert_eq!(without_small(&before, 7, 1), None);
    }

    #[test]
    fn the_largest_island_stays_however_small() {
        assert_eq!(without_small(&mask("#...##...#"), 10, 3), Some(mask("....##....")));
    }

    #[test]
    fn diagonal_neighbours_are_one_part() {
        assert_eq!(without_small(&mask("#... .#.. ...."), 4, 2), None);
    }
}
