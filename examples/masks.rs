//! Everything in an image, without a prompt: masks, COCO's JSON and a label image.

use anyhow::Result;
use candle_core::{DType, Device};
use candle_sam_lora::sam::{
    label_image, read_image, save_labels, AttentionKind, CocoAnnotations, MaskGenerator, SamModel,
    SamPredictor, SamProcessor,
};

pub fn main() -> Result<()> {
    let folder = "assets/tiny-sam";
    let model = SamModel::from_pretrained(folder, AttentionKind::Fused, DType::F32, &Device::Cpu)?;
    let processor = SamProcessor::load(folder, model.config().vision_config.image_size)?;
    let predictor = SamPredictor::with_processor(&model, processor);

    let image = read_image("assets/photos/coins/heldout/images/coins_r0c2.png")?;
    // A small model is less sure of itself than SAM: the thresholds are lower than the default.
    let generator = MaskGenerator {
        points_per_side: 8,
        pred_iou_thresh: 0.6,
        stability_score_thresh: 0.6,
        ..MaskGenerator::default()
    };
    let masks = generator.generate_with(&predictor, &image, |done, all| {
        eprintln!("{done} of {all} points");
    })?;
    for mask in &masks {
        println!("{:?}: {} pixels, IoU {:.3}", mask.bounds, mask.mask.area(), mask.iou_score);
    }

    let (folder, size) = (std::env::temp_dir(), (image.height(), image.width()));
    let mut annotations = CocoAnnotations::default();
    annotations.push("coins_r0c2.png", size, &masks)?;
    annotations.save(folder.join("candle-sam-lora-coins.json"))?;
    save_labels(folder.join("candle-sam-lora-coins.png"), &label_image(&masks, size), size)?;
    Ok(())
}
