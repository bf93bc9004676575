//! Any pixels of any kind as a mask, read by the rules: labels of the right size, or a message.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use candle_sam_lora::sam::{Raster, RasterKind, SampleType, Samples};
use candle_sam_lora::train::{find_instances, interpret, MaskOptions, Meaning, IGNORED};

#[derive(Arbitrary, Debug)]
struct Input {
    width: u8,
    kind: u8,
    sample: u8,
    /// Few values make labels, many make noise.
    palette: Vec<f64>,
    ignore: Option<Vec<i64>>,
    background: Option<i64>,
    parts: bool,
    places: Vec<u8>,
}

fn raster(input: &Input) -> Option<Raster> {
    let kind = match input.kind % 5 {
        0 => RasterKind::Grey,
        1 => RasterKind::Palette,
        2 => RasterKind::GreyAlpha,
        3 => RasterKind::Rgb,
        _ => RasterKind::Rgba,
    };
    let channels = kind.colours() + usize::from(kind.has_alpha());
    let width = usize::from(input.width % 24) + 1;
    let height = input.places.len() / (width * channels);
    let value = |place: &u8| {
        let palette = &input.palette;
        let index = usize::from(*place) % palette.len().max(1);
        palette.get(index).copied().unwrap_or(f64::from(*place))
    };
    let places = input.places[..width * height * channels].iter();
    let (sample_type, samples) = match input.sample % 6 {
        0 => (SampleType::Unsigned(8), Samples::U8(places.copied().collect())),
        1 => {
            let values = places.map(|place| value(place) as u8);
            (SampleType::Unsigned(8), Samples::U8(values.collect()))
        }
        2 => {
            let values = places.map(|place| value(place) as u16);
            (SampleType::Unsigned(16), Samples::U16(values.collect()))
        }
        3 => {
            let values = places.map(|place| (value(place) as i64) as f64);
            (SampleType::Signed(64), Samples::Wide(values.collect()))
        }
        4 => {
            let values = places.map(|place| f64::from(value(place) as u32));
            (SampleType::Unsigned(32), Samples::Wide(values.collect()))
        }
        _ => (SampleType::Float(64), Samples::Wide(places.map(value).collect())),
    };
    Raster::new(width as u32, height as u32, kind, sample_type, samples)
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let Some(raster) = raster(&input) else { return };
    let Input { ignore, background, parts, .. } = input;
    let options = MaskOptions { ignore, background, parts, page: None };
    match interpret(&raster, &options) {
        Err(message) => assert!(!message.is_empty()),
        Ok(mask) => {
            assert_eq!(mask.labels.dimensions(), (raster.width, raster.height));
            let found = find_instances(&mask.labels, 1);
            assert_eq!(found.is_empty(), mask.meaning == Meaning::Empty);
            let inside: usize = found.iter().map(|instance| instance.area).sum();
            let outside = mask.labels.pixels().filter(|pixel| [0, IGNORED].contains(&pixel.0[0]));
            assert_eq!(inside + outside.count(), mask.labels.len());
            // The same pixels mean the same again.
            let again = interpret(&raster, &options).map(|mask| mask.labels);
            assert_eq!(again.ok().as_ref(), Some(&mask.labels));
        }
    }
});
