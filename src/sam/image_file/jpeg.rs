//! Whether a JPEG is whole: decoders fill the missing part of a cut file with grey.

/// Whether the file's data go on to the end of its first image, the marker EOI.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    let mut place = 2; // after SOI
    loop {
        // A marker is FF and a code; more FF may stand before it, and zero-stuffed data between.
        let Some(found) = bytes.get(place..).and_then(|rest| rest.iter().position(|b| *b == 0xff))
        else {
            return false;
        };
        place += found + 1;
        match bytes.get(place) {
            Some(0xd9) => return true,
            Some(0xff) => {}
            // Stuffing, TEM, restarts, SOI: without a length.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => place += 1,
            Some(_) => {
                let Some(length) = bytes.get(place + 1..place + 3) else { return false };
                place += 1 + usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
            }
            None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_complete;

    #[test]
    fn only_the_whole_file_is_complete() {
        for image in [
            image::DynamicImage::new_rgb8(40, 30),
            image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * y) as u8, x as u8, 99]))
                .into(),
        ] {
            let mut jpeg = std::io::Cursor::new(Vec::new());
            image.write_to(&mut jpeg, image::ImageFormat::Jpeg).expect("a JPEG");
            let jpeg = jpeg.into_inner();
            assert!(is_complete(&jpeg));
            assert!(is_complete(&[&jpeg[..], b"trailing bytes"].concat()));
            for end in 0..jpeg.len() {
                assert!(!is_complete(&jpeg[..end]), "{end} of {}", jpeg.len());
            }
            let unfilled = [&jpeg[..jpeg.len() / 2], &[0; 500]].concat();
            assert!(!is_complete(&unfilled));
        }
    }
}
