//! A contact sheet: small pictures in rows, their names below.

use super::draw::{register_font, save_png};
use super::photo::read_plain;
use anyhow::{anyhow, Result};
use image::{imageops, Rgb, RgbImage};
use plotters::prelude::*;
use std::path::{Path, PathBuf};

/// The place of a picture, in pixels.
const CELL: (u32, u32) = (240, 200);
/// The line of its name below.
const LINE: u32 = 22;
const MARGIN: u32 = 10;
const FONT: (&str, i32) = ("sans-serif", 14);
/// Rows of one file; more pictures go into further files.
const ROWS: usize = 50;

/// The files of a sheet of so many pictures: `path`, and with many pictures `STEM.2.png` and so on.
pub fn files(path: &Path, pictures: usize, columns: usize) -> Vec<PathBuf> {
    let file = |index: usize| match index {
        0 => path.to_path_buf(),
        _ => path.with_extension(format!("{}.png", index + 1)),
    };
    (0..pictures.div_ceil(of_a_file(columns))).map(file).collect()
}

/// A sheet of `columns` pictures a row. Returns its [`files`].
pub fn write(path: &Path, pictures: &[(String, PathBuf)], columns: usize) -> Result<Vec<PathBuf>> {
    register_font()?;
    let files = files(path, pictures.len(), columns);
    for (path, part) in files.iter().zip(pictures.chunks(of_a_file(columns))) {
        save_png(path, &sheet(part, columns.clamp(1, part.len()))?.into())?;
    }
    Ok(files)
}

/// How many pictures a file has.
fn of_a_file(columns: usize) -> usize {
    columns.max(1).saturating_mul(ROWS)
}

fn sheet(pictures: &[(String, PathBuf)], columns: usize) -> Result<RgbImage> {
    let step = (CELL.0 + MARGIN, CELL.1 + LINE + MARGIN);
    let rows = pictures.len().div_ceil(columns) as u32;
    let size = (columns as u32 * step.0 + MARGIN, rows * step.1 + MARGIN);
    let mut sheet = RgbImage::from_pixel(size.0, size.1, Rgb([255; 3]));
    let corner = |index: usize| {
        let (column, row) = ((index % columns) as u32, (index / columns) as u32);
        (MARGIN + column * step.0, MARGIN + row * step.1)
    };
    for (index, (_, path)) in pictures.iter().enumerate() {
        let small = read_plain(path)?.thumbnail(CELL.0, CELL.1).into_rgb8();
        let (x, y) = corner(index);
        let (x, y) = (x + (CELL.0 - small.width()) / 2, y + (CELL.1 - small.height()) / 2);
        imageops::replace(&mut sheet, &small, x.into(), y.into());
    }
    let mut pixels = sheet.into_raw();
    {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        let style = TextStyle::from(FONT.into_font()).color(&BLACK);
        for (index, (name, _)) in pictures.iter().enumerate() {
            let mut shown = name.clone();
            while area.estimate_text_size(&shown, &style)?.0 > CELL.0 && shown.chars().count() > 2 {
                shown = shortened(&shown);
            }
            let width = area.estimate_text_size(&shown, &style)?.0.min(CELL.0);
            let (x, y) = corner(index);
            let place = ((x + (CELL.0 - width) / 2) as i32, (y + CELL.1 + 4) as i32);
            area.draw(&Text::new(shown, place, style.clone()))?;
        }
        area.present()?;
    }
    RgbImage::from_raw(size.0, size.1, pixels).ok_or_else(|| anyhow!("the sheet has no pixels"))
}

/// A name without a letter of its middle.
fn shortened(name: &str) -> String {
    let letters: Vec<char> = name.chars().filter(|letter| *letter != '…').collect();
    let half = letters.len().saturating_sub(1) / 2;
    let (start, end) = (&letters[..half], &letters[letters.len() - half..]);
    start.iter().chain(&['…']).chain(end).collect()
}

#[cfg(test)]
mod tests {
    use super::shortened;

    #[test]
    fn names_lose_their_middle() {
        assert_eq!(shortened("abcdef"), "ab…ef");
        assert_eq!(shortened("ab…ef"), "a…f");
        assert_eq!(shortened("a…f"), "…");
    }
}
