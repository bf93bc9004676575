//! Cellpose-SAM against the package cellpose (tests/fixtures/gen/cellpose.py): the network and its gradients in f64,
//! whole images in f32, labels of given flow fields pixel for pixel.

use crate::common::model;
use crate::common::model::{
    below, bits, folder, gradient_errors, read, relative_error, scalars, Tensors, Worst,
};
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, save_adapter, LoraConfig};
use candle_sam_lora::nn::{self, set_trainable, Mode};
use candle_sam_lora::sam::{checkpoint, normalized_image, AttentionKind, SamVisionConfig};
use candle_sam_lora::sam::{CellDynamics, CellFlows, CellposeSam};
use image::{DynamicImage, RgbImage};

/// Three times PyTorch's own error in f32, which is 5.8e-6 for values and 2.0e-5 for gradients. There as here, the
/// places where tables are resized are in f32.
const TOLERANCE: f64 = 1.8e-5;
const GRADIENT_TOLERANCE: f64 = 6.0e-5;
const KINDS: [AttentionKind; 2] = [AttentionKind::Fused, AttentionKind::Split];
const FIELDS: [&str; 5] = ["discs", "noisy", "small", "large", "none"];

fn zeros(kind: AttentionKind) -> Result<CellposeSam> {
    let sam = SamVisionConfig {
        hidden_size: 16,
        output_channels: 12,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        mlp_dim: Some(32),
        global_attn_indexes: vec![1],
        ..Default::default()
    };
    Ok(CellposeSam::new(&sam, [64, 8], kind, VarBuilder::zeros(DType::F32, &Device::Cpu))?)
}

fn model(kind: AttentionKind) -> Result<CellposeSam> {
    let mut model = zeros(kind)?;
    let path = folder("cellpose").join("model.pth");
    nn::checkpoint::load(&mut model, path, &checkpoint::CELLPOSE_SAM)?;
    Ok(model)
}

/// Names of a state dictionary as those of the tree.
fn to_tree(tensors: &Tensors) -> Tensors {
    let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
    let names = checkpoint::CELLPOSE_SAM.to_tree(&names);
    names.into_iter().zip(tensors.values().cloned()).collect()
}

fn flows(tensor: &Tensor) -> Result<CellFlows> {
    let (_, height, width) = tensor.dims3()?;
    let plane = |index: usize| tensor.get(index)?.flatten_all()?.to_vec1::<f32>();
    let (down, right, probability) = (plane(0)?, plane(1)?, plane(2)?);
    Ok(CellFlows { down, right, probability, size: (height, width) })
}

#[test]
fn flows_equal_the_package() -> Result<()> {
    let io = read("cellpose", "io.safetensors")?;
    let mut worst = Worst::default();
    for kind in KINDS {
        let found = io["network/pixel_values"].apply(&model(kind)?)?;
        worst.compare(&format!("{kind:?}"), &found, &io["network/flows"])?;
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

#[test]
fn gradients_equal_pytorch() -> Result<()> {
    let io = read("cellpose", "io.safetensors")?;
    let mut worst = Worst::default();
    for kind in KINDS {
        let mut model = model(kind)?;
        // The package takes the patches' projection past autograd.
        set_trainable(&mut model, |name| !name.contains("projection"))?;
        let found = model.forward(&io["network/pixel_values"], Mode::Train { seed: 0 })?;
        let gradients = (found * &io["network/G"])?.sum_all()?.backward()?;
        let expected = to_tree(&below(&io, "network/grad/"));
        for (name, error) in gradient_errors(&model, &gradients, &expected)? {
            worst.add(&format!("{kind:?} {name}"), error);
        }
    }
    worst.assert_within(GRADIENT_TOLERANCE);
    Ok(())
}

#[test]
fn whole_images_equal_the_package() -> Result<()> {
    let io = read("cellpose", "io.safetensors")?;
    let (height, width, _) = io["tiles/image"].dims3()?;
    let pixels = io["tiles/image"].flatten_all()?.to_vec1::<u8>()?;
    let image = RgbImage::from_raw(width as u32, height as u32, pixels).expect("the size");
    let normalized = normalized_image(&DynamicImage::from(image))?;
    assert_eq!(bits(&normalized)?, bits(&io["tiles/normalized"])?);
    let found = model(AttentionKind::Fused)?.flows(&normalized)?;
    let planes = [found.down, found.right, found.probability].concat();
    let found = Tensor::from_vec(planes, (3, height, width), &Device::Cpu)?;
    let error = relative_error(&found, &io["tiles/flows"])?;
    // Both are in f32.
    ensure!(error <= 2.0 * TOLERANCE, "{error:e}");
    println!("largest relative error {error:.2e}");
    Ok(())
}

#[test]
fn labels_equal_the_package() -> Result<()> {
    let io = read("cellpose", "io.safetensors")?;
    for field in FIELDS {
        let settings = scalars("cellpose", field)?;
        let number = |name: &str| settings[name].as_f64().unwrap();
        let dynamics = CellDynamics {
            cell_threshold: number("cellprob_threshold") as f32,
            flow_threshold: number("flow_threshold"),
            min_size: number("min_size") as usize,
            max_size_fraction: number("max_size_fraction"),
            iterations: number("niter") as usize,
        };
        let labels = dynamics.labels(&flows(&io[&format!("{field}/flows")])?)?;
        let expected = io[&format!("{field}/labels")].flatten_all()?.to_vec1::<u8>()?;
        let differ = labels.iter().zip(&expected).filter(|(a, b)| **a != u32::from(**b)).count();
        let cells = labels.iter().max().copied().unwrap_or(0);
        println!("{field}: {cells} cells, {differ} of {} pixels differ", labels.len());
        ensure!(labels.len() == expected.len() && differ == 0, "{field}: {differ} differ");
    }
    Ok(())
}

#[test]
fn an_adapter_comes_back() -> Result<()> {
    let mut adapted = model(AttentionKind::Split)?;
    let lora = LoraConfig::new(2).target_modules(["q", "v"]).modules_to_save(["out"]);
    inject(&mut adapted, &lora, 1)?;
    nn::randomize(&mut adapted, 2, 0.1)?;
    let dir = tempfile::tempdir()?;
    save_adapter(&adapted, &lora, dir.path())?;
    let mut loaded = model(AttentionKind::Split)?;
    load_adapter(&mut loaded, dir.path())?;
    let state = |model: &CellposeSam| candle_sam_lora::lora::adapter_state(model, &lora);
    for ((key, want), (_, got)) in state(&adapted)?.iter().zip(state(&loaded)?) {
        assert_eq!(bits(&got)?, bits(want)?, "{key}");
    }
    Ok(())
}

#[test]
fn other_networks_are_refused() -> Result<()> {
    let mut network = model(AttentionKind::Fused)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("cpdino.safetensors");
    nn::checkpoint::save(&network, &path, &checkpoint::CELLPOSE_SAM, None)?;
    let mut tensors = candle_sam_lora::files::read_tensors(&path, &Device::Cpu)?;
    assert!(tensors.contains_key("encoder.blocks.0.attn.qkv.weight"));
    let token = Tensor::zeros((1, 1, 16), DType::F32, &Device::Cpu)?;
    tensors.insert("encoder.cls_token".into(), token);
    candle_sam_lora::files::write_tensors(&path, &tensors)?;
    for (path, words) in
        [(path, "on DINOv3"), (folder("tiny").join("original.safetensors"), "missing: W2")]
    {
        let loaded = nn::checkpoint::load(&mut network, path, &checkpoint::CELLPOSE_SAM);
        let error = loaded.expect_err("accepted").to_string();
        assert!(error.contains(words), "{error}");
    }
    let mut sam = model::zeros(&model::config("tiny")?, AttentionKind::Fused)?;
    let error = checkpoint::load(&mut sam, folder("cellpose").join("model.pth")).unwrap_err();
    assert!(error.to_string().contains("without prompt_encoder and mask_decoder"), "{error}");
    Ok(())
}

#[test]
fn fields_that_do_not_fit_are_refused() -> Result<()> {
    let field = |size: (usize, usize), values: usize| CellFlows {
        down: vec![0.0; values],
        right: vec![0.0; values],
        probability: vec![0.0; values],
        size,
    };
    for (field, words) in
        [(field((1, 9), 9), "9 x 1 pixels"), (field((3, 4), 11), "11 values of down")]
    {
        let error = CellDynamics::default().labels(&field).expect_err("accepted").to_string();
        assert!(error.contains(words), "{error}");
    }
    let image = Tensor::zeros((4, 8, 8), DType::F32, &Device::Cpu)?;
    let error = zeros(AttentionKind::Fused)?.flows(&image).expect_err("accepted").to_string();
    assert!(error.contains("[1 to 3, H, W]"), "{error}");
    Ok(())
}
