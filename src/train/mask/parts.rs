//! The connected parts of a mask.

/// A connected part of pixels of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The value of its pixels.
    pub value: i64,
    /// How many pixels it has.
    pub area: usize,
    /// Which of the image's four borders it touches, a bit each.
    pub sides: u8,
    /// How many of the image's four corners it has.
    pub corners: u8,
}

impl Part {
    /// How many borders of the image it touches.
    pub fn borders(&self) -> u32 {
        self.sides.count_ones()
    }
}

/// Each pixel's part, numbered from 1 in reading order, 0 where `inside` denies the value; and the parts. Pixels of
/// one part have one value, and touch each other, at corners too if `diagonal`.
pub(super) fn parts(
    values: &[i64],
    width: usize,
    diagonal: bool,
    inside: impl Fn(i64) -> bool,
) -> (Vec<u32>, Vec<Part>) {
    let width = width.max(1);
    let height = values.len() / width;
    let mut numbers = vec![0u32; values.len()];
    let mut parts: Vec<Part> = vec![];
    let mut open = vec![];
    for start in 0..values.len() {
        let value = values[start];
        if numbers[start] != 0 || !inside(value) {
            continue;
        }
        let number = parts.len() as u32 + 1;
        let (mut area, mut sides, mut corners) = (0, 0u8, 0);
        numbers[start] = number;
        open.push(start);
        while let Some(place) = open.pop() {
            let (x, y) = (place % width, place / width);
            let touched = [x == 0, y == 0, x + 1 == width, y + 1 == height];
            area += 1;
            corners += u8::from((touched[0] || touched[2]) && (touched[1] || touched[3]));
            sides |= (0..4).map(|side| u8::from(touched[side]) << side).sum::<u8>();
            for ny in y.saturating_sub(1)..(y + 2).min(height) {
                for nx in x.saturating_sub(1)..(x + 2).min(width) {
                    let next = ny * width + nx;
                    let beside = diagonal || nx == x || ny == y;
                    if beside && numbers[next] == 0 && values[next] == value {
                        numbers[next] = number;
                        open.push(next);
                    }
                }
            }
        }
        parts.push(Part { value, area, sides, corners });
    }
    (numbers, parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_numbered_in_reading_order() {
        #[rustfmt::skip]
        let values = [
            1, 0, 0, 2,
            0, 1, 0, 2,
            0, 0, 0, 1,
        ];
        let (numbers, found) = parts(&values, 4, true, |value| value != 0);
        assert_eq!(numbers, [1, 0, 0, 2, 0, 1, 0, 2, 0, 0, 0, 3]);
        assert_eq!(found[0], Part { value: 1, area: 2, sides: 0b0011, corners: 1 });
        assert_eq!(found[1], Part { value: 2, area: 2, sides: 0b0110, corners: 1 });
        assert_eq!(parts(&values, 4, false, |value| value == 1).1.len(), 3);
        assert!(parts(&[], 0, true, |_| true).1.is_empty());
    }

    #[test]
    fn a_frame_touches_all_borders() {
        let frame: Vec<i64> =
            (0..25).map(|i| i64::from(i % 5 == 0 || i % 5 == 4 || !(5..20).contains(&i))).collect();
        let (_, found) = parts(&frame, 5, true, |value| value != 0);
        assert_eq!(found, [Part { value: 1, area: 16, sides: 0b1111, corners: 4 }]);
    }
}
