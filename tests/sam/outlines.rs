//! Polygons along the edges of pixels give their mask back, and GeoJSON holds them.

use crate::common::property;
use anyhow::{ensure, Context, Result};
use candle_sam_lora::sam::{geojson_feature, save_geojson, Crop, GeneratedMask, Polygon, Rle};
use proptest::prelude::*;
use std::collections::HashSet;

fn mask(rows: &[&str]) -> Result<Rle> {
    let pixels: Vec<bool> = rows.iter().flat_map(|row| row.chars().map(|c| c == '#')).collect();
    Ok(Rle::from_mask(&pixels, (rows.len() as u32, rows[0].len() as u32))?)
}

/// The pixels whose centres lie in an odd number of rings.
fn filled(polygons: &[Polygon], (height, width): (u32, u32)) -> Vec<bool> {
    let mut inside = vec![false; (height * width) as usize];
    for ring in polygons.iter().flatten() {
        // A vertical side changes everything to its right.
        for side in ring.windows(2).filter(|side| side[0][0] == side[1][0]) {
            for y in side[0][1].min(side[1][1])..side[0][1].max(side[1][1]) {
                (side[0][0]..width).for_each(|x| inside[(y * width + x) as usize] ^= true);
            }
        }
    }
    inside
}

fn doubled_area(ring: &[[u32; 2]]) -> i64 {
    let number = |value: u32| i64::from(value);
    let cross =
        |p: &[[u32; 2]]| number(p[0][0]) * number(p[1][1]) - number(p[1][0]) * number(p[0][1]);
    ring.windows(2).map(cross).sum()
}

/// The 4-connected parts of a mask, counted by flooding.
fn count_parts(mask: &[bool], (height, width): (u32, u32)) -> usize {
    let (height, width) = (height as usize, width as usize);
    let mut left = mask.to_vec();
    let mut count = 0;
    while let Some(start) = left.iter().position(|inside| *inside) {
        count += 1;
        let mut open = vec![start];
        while let Some(place) = open.pop() {
            if !std::mem::replace(&mut left[place], false) {
                continue;
            }
            let (y, x) = (place / width, place % width);
            open.extend((x > 0).then(|| place - 1));
            open.extend((x + 1 < width).then_some(place + 1));
            open.extend((y > 0).then(|| place - width));
            open.extend((y + 1 < height).then_some(place + width));
        }
    }
    count
}

fn check(pixels: &[bool], size: (u32, u32)) -> Result<()> {
    let polygons = Rle::from_mask(pixels, size)?.polygons();
    ensure!(filled(&polygons, size) == pixels, "another mask: {polygons:?}");
    ensure!(polygons.len() == count_parts(pixels, size), "{} polygons", polygons.len());
    for polygon in &polygons {
        for (index, ring) in polygon.iter().enumerate() {
            ensure!(ring.len() >= 5 && ring.first() == ring.last(), "not closed: {ring:?}");
            ensure!((doubled_area(ring) > 0) == (index == 0), "turns the wrong way: {ring:?}");
            let corners: HashSet<_> = ring.iter().collect();
            ensure!(corners.len() + 1 == ring.len(), "meets itself: {ring:?}");
            let turn = |p: &[[u32; 2]]| p[0][0] != p[2][0] && p[0][1] != p[2][1];
            ensure!(ring.windows(3).all(turn), "a corner on a side: {ring:?}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(property::config(512))]

    #[test]
    fn polygons_give_their_mask_back(
        (size, pixels) in (1u32..14, 1u32..14).prop_flat_map(|size| {
            let count = (size.0 * size.1) as usize;
            (Just(size), (1u32..10).prop_flat_map(move |density| {
                prop::collection::vec((0u32..10).prop_map(move |v| v < density), count)
            }))
        })
    ) {
        check(&pixels, size).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

/// Holes that touch at a corner, a bay closed by a corner, an island in a hole.
#[test]
fn corners_that_touch_stay_simple_rings() -> Result<()> {
    for rows in [
        &["#####", "#.###", "##.##", "#####"][..],
        &["####", "#..#", "#.#.", "##.."],
        &["#####", "#...#", "#.#.#", "#...#", "#####"],
        &["#.#.", ".#.#", "#.#."],
        &[".##.", "#..#", "#..#", ".##."],
    ] {
        let mask = mask(rows)?;
        check(&mask.to_mask(), mask.size())?;
    }
    Ok(())
}

#[test]
fn features_hold_polygons_and_scores() -> Result<()> {
    let shapes = [
        (&["....", ".##.", ".##."][..], "Polygon"),
        (&["###.", "#.#.", "####"], "Polygon"),
        (&["#..#", "....", "...#"], "MultiPolygon"),
        (&["....", "....", "...."], "MultiPolygon"),
    ];
    let mut masks = vec![];
    for (rows, kind) in shapes {
        let mask = mask(rows)?;
        let found = GeneratedMask {
            bounds: mask.bounds().unwrap_or_default(),
            mask,
            iou_score: 0.75,
            stability_score: 0.5,
            point: [1.0, 1.0],
            crop: Crop { left: 0, top: 0, right: 4, bottom: 3 },
        };
        let feature = geojson_feature(7, &found);
        ensure!(feature["geometry"]["type"] == kind && feature["id"] == 7, "{feature}");
        masks.push(found);
    }
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("masks.geojson");
    save_geojson(&path, &masks)?;
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let features = json["features"].as_array().context("no features")?;
    ensure!(json["type"] == "FeatureCollection" && features.len() == 4);
    ensure!(
        features[0]["geometry"]["coordinates"]
            == serde_json::json!([[[1, 1], [3, 1], [3, 3], [1, 3], [1, 1]]])
    );
    let expected = serde_json::json!({
        "id": 1, "predicted_iou": 0.75, "stability_score": 0.5, "area": 4, "bbox": [1, 1, 3, 3]
    });
    ensure!(features[0]["properties"] == expected, "{}", features[0]["properties"]);
    let rings = |feature: usize| features[feature]["geometry"]["coordinates"].as_array();
    ensure!(rings(1).is_some_and(|rings| rings.len() == 2), "a ring and its hole");
    ensure!(rings(2).is_some_and(|parts| parts.len() == 3), "three parts");
    ensure!(rings(3).is_some_and(Vec::is_empty), "an empty mask");
    save_geojson(&path, &[])?;
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
    ensure!(json["features"] == serde_json::json!([]));
    Ok(())
}

/// The fields are public. Runs beyond the size, and a size without pixels, are no panic.
#[test]
fn runs_of_no_mask_are_no_panic() {
    for (size, counts) in [
        ((0, 0), vec![0, 1]),
        ((0, 5), vec![2, 3, 1]),
        ((2, 0), vec![0, 2]),
        ((2, 2), vec![0, 99]),
        ((2, 2), vec![1, u32::MAX, 5, u32::MAX]),
    ] {
        let mask = Rle { size, counts };
        let has_pixels = size.0 > 0;
        assert_eq!(mask.bounds().is_some(), has_pixels, "{mask:?}");
        let area: i64 = mask.polygons().iter().flatten().map(|ring| doubled_area(ring) / 2).sum();
        let painted = mask.to_mask().into_iter().filter(|inside| *inside).count();
        assert_eq!(area, painted as i64, "{mask:?}");
        assert_eq!(mask.to_mask().len(), (size.0 * size.1) as usize);
        assert!(mask.intersection(&mask) == mask.area() && !mask.compressed().is_empty());
    }
}
