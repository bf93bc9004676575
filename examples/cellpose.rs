//! Cells by Cellpose-SAM: `cargo run --release --example cellpose MODEL IMAGE LABELS`.
//!
//! MODEL is a checkpoint of Cellpose 4, such as `~/.cellpose/models/cpsam_v2`. LABELS is a PNG of 16 bits or a TIFF of
//! 32, the number of the cell in each pixel.

use anyhow::{bail, Result};
use candle_core::{DType, Device};
use candle_sam_lora::sam::{
    normalized_image, read_image, save_labels, AttentionKind, CellDynamics, CellposeSam,
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, image, output] = &arguments[..] else {
        bail!("usage: cellpose MODEL IMAGE LABELS")
    };
    let model =
        CellposeSam::from_pretrained(model, AttentionKind::Fused, DType::F32, &Device::Cpu)?;
    let image = read_image(image)?;
    let flows = model.flows(&normalized_image(&image)?)?;
    let labels = CellDynamics::default().labels(&flows)?;
    save_labels(output, &labels, (image.height(), image.width()))?;
    println!("{} cells in {output}", labels.iter().max().copied().unwrap_or(0));
    Ok(())
}
