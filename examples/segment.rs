//! An object cut out of an image: embed the image once, then ask for the mask of a point and of a box.

use anyhow::Result;
use candle_core::{DType, Device};
use candle_sam_lora::sam::{
    read_image, AttentionKind, Prompt, SamModel, SamPredictor, SamProcessor,
};
use image::GrayImage;

pub fn main() -> Result<()> {
    let folder = "assets/tiny-sam"; // or sam_vit_b_01ec64.pth, or facebook/sam-vit-base with the feature `hub`
    let model = SamModel::from_pretrained(folder, AttentionKind::Fused, DType::F32, &Device::Cpu)?;
    let processor = SamProcessor::load(folder, model.config().vision_config.image_size)?;
    let predictor = SamPredictor::with_processor(&model, processor);

    let image = read_image("assets/photos/nuclei/heldout/images/nuclei_r6c0.png")?;
    let embedding = predictor.embed(&image)?;
    let prompts = [Prompt::at(30.0, 30.0), Prompt::within([4.0, 4.0, 30.0, 30.0])];
    for (index, found) in predictor.predict(&embedding, &prompts, true)?.iter().enumerate() {
        let best = found.best();
        let mask = predictor.mask(&embedding, found, best)?;
        let pixels = mask.to_mask().into_iter().map(|inside| if inside { 255 } else { 0 });
        let path = std::env::temp_dir().join(format!("candle-sam-lora-object-{index}.png"));
        if let Some(picture) = GrayImage::from_vec(image.width(), image.height(), pixels.collect())
        {
            picture.save(&path)?;
        }
        println!("{}: {} pixels, IoU {:.3}", path.display(), mask.area(), found.iou_scores[best]);
    }
    Ok(())
}
