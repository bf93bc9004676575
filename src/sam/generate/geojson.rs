//! Masks as GeoJSON in pixels, for QGIS, QuPath and GeoPandas.

use super::GeneratedMask;
use crate::{files, Result};
use serde_json::{json, Value};
use std::path::Path;

/// One feature for a mask, a `Polygon` or, of several parts, a `MultiPolygon`; see
/// [`Rle::polygons`](crate::sam::Rle::polygons).
///
/// Coordinates are pixels, y downward. The properties are `id`, `predicted_iou`, `stability_score`, `area` in pixels,
/// and `bbox` as `[x0, y0, x1, y1]`, the outer edges of the first and last pixels.
///
/// [Example](crate::sam::label_image)
pub fn geojson_feature(id: usize, mask: &GeneratedMask) -> Value {
    let mut polygons = mask.mask.polygons();
    let geometry = match polygons.len() {
        1 => json!({ "type": "Polygon", "coordinates": polygons.remove(0) }),
        _ => json!({ "type": "MultiPolygon", "coordinates": polygons }),
    };
    let edges = mask.mask.bounds().map(|[x0, y0, x1, y1]| [x0, y0, x1 + 1, y1 + 1]);
    json!({
        "type": "Feature",
        "id": id,
        "geometry": geometry,
        "properties": {
            "id": id,
            "predicted_iou": mask.iou_score,
            "stability_score": mask.stability_score,
            "area": mask.mask.area(),
            "bbox": edges,
        },
    })
}

/// Writes masks as a `FeatureCollection`, numbered from 1, or leaves what was there. One feature at a time is in
/// memory.
///
/// [Example](crate::guide::everything)
///
/// # Errors
/// - the file cannot be written.
pub fn save_geojson(path: impl AsRef<Path>, masks: &[GeneratedMask]) -> Result<()> {
    files::write_atomic(path, |file| {
        file.write_all(b"{\"type\":\"FeatureCollection\",\"features\":[")?;
        for (index, mask) in masks.iter().enumerate() {
            file.write_all(if index > 0 { b",\n" } else { b"\n" })?;
            serde_json::to_writer(&mut *file, &geojson_feature(index + 1, mask))?;
        }
        file.write_all(b"\n]}\n")
    })
}
