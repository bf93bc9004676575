//! Encoders of other models against transformers in f64 (tests/fixtures/gen/towers.py): values, gradients, checkpoints.

use crate::common::model::{below, bits, folder, gradient_errors, read, Tensors, Worst};
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, save_adapter, LoraConfig};
use candle_sam_lora::nn::checkpoint::Names;
use candle_sam_lora::nn::{self, set_trainable, Mode, ModuleTree};
use candle_sam_lora::sam::checkpoint::{DEEPSEEK_OCR, DEEPSEEK_VL, VITDET};
use candle_sam_lora::sam::{AttentionKind, SamVisionConfig};
use candle_sam_lora::sam::{DeepSeekOcrEncoder, DeepseekVlHighRes, VitDetBackbone, VitDetConfig};

/// As in tests/sam/model.rs, for values and for gradients.
const TOLERANCE: f64 = 5.4e-6;
const GRADIENT_TOLERANCE: f64 = 7.6e-6;
const KINDS: [AttentionKind; 2] = [AttentionKind::Fused, AttentionKind::Split];

fn zeros() -> VarBuilder<'static> {
    VarBuilder::zeros(DType::F32, &Device::Cpu)
}

fn config() -> SamVisionConfig {
    SamVisionConfig {
        hidden_size: 32,
        output_channels: 8,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        image_size: 64,
        patch_size: 8,
        mlp_dim: Some(48),
        window_size: 3,
        global_attn_indexes: vec![2],
        ..Default::default()
    }
}

/// An encoder of these tests.
trait Tower: ModuleTree {
    fn encode(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor>;
}

macro_rules! tower {
    ($($tower:ty),*) => {
        $(impl Tower for $tower {
            fn encode(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
                self.forward(pixel_values, mode)
            }
        })*
    };
}

tower!(DeepSeekOcrEncoder, DeepseekVlHighRes, VitDetBackbone);

fn deepseek_vl(kind: AttentionKind) -> Result<DeepseekVlHighRes> {
    let config = SamVisionConfig { global_attn_indexes: vec![1, 2], ..config() };
    Ok(DeepseekVlHighRes::new(&config, 3, kind, zeros())?)
}

fn unlimited(kind: AttentionKind) -> Result<DeepSeekOcrEncoder> {
    Ok(DeepSeekOcrEncoder::new(&config(), [20, 28], kind, zeros())?)
}

fn vitdet(kind: AttentionKind) -> Result<VitDetBackbone> {
    let config = VitDetConfig::load(folder("vitdet").join("config.json"))?;
    Ok(VitDetBackbone::new(&config, kind, zeros())?)
}

/// A tower, its names and its folder.
type Named = (Box<dyn Tower>, Names, &'static str);

/// Every tower with its weights.
fn towers(kind: AttentionKind) -> Result<Vec<Named>> {
    let mut towers: Vec<Named> = vec![
        (Box::new(deepseek_vl(kind)?), DEEPSEEK_VL, "deepseek_vl"),
        (Box::new(unlimited(kind)?), DEEPSEEK_OCR, "unlimited"),
        (Box::new(vitdet(kind)?), VITDET, "vitdet"),
    ];
    for (tower, names, folder_name) in &mut towers {
        nn::checkpoint::load(tower.as_mut(), folder(folder_name), names)?;
    }
    Ok(towers)
}

#[test]
fn tokens_equal_transformers() -> Result<()> {
    let mut worst = Worst::default();
    for kind in KINDS {
        for (tower, _, name) in towers(kind)? {
            let io = read(name, "io.safetensors")?;
            let tokens = tower.encode(&io["all/pixel_values"], Mode::Eval)?;
            worst.compare(&format!("{name} {kind:?}"), &tokens, &io["all/tokens"])?;
        }
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

#[test]
fn gradients_equal_pytorch() -> Result<()> {
    let mut worst = Worst::default();
    for kind in KINDS {
        for (mut tower, names, name) in towers(kind)? {
            let io = read(name, "io.safetensors")?;
            set_trainable(tower.as_mut(), |_| true)?;
            let tokens = tower.encode(&io["all/pixel_values"], Mode::Train { seed: 0 })?;
            let gradients = (tokens * &io["all/G"])?.sum_all()?.backward()?;
            let expected = in_tree(&names, below(&io, "all/grad/"));
            let errors = gradient_errors(tower.as_ref(), &gradients, &expected)?;
            ensure!(errors.len() > 20, "{name}: {} compared", errors.len());
            for (parameter, error) in errors {
                worst.add(&format!("{name} {kind:?} {parameter}"), error);
            }
        }
    }
    worst.assert_within(GRADIENT_TOLERANCE);
    Ok(())
}

/// Tensors under the names of the tree.
fn in_tree(names: &Names, tensors: Tensors) -> Tensors {
    let plain = |name: &str| name.replace("proj.conv1.", "net_2.").replace("proj.conv2.", "net_3.");
    let in_file: Vec<String> = match names.wrapped.is_empty() {
        true => tensors.keys().cloned().collect(),
        false => tensors.keys().map(|name| plain(name)).collect(),
    };
    let in_file: Vec<&str> = in_file.iter().map(String::as_str).collect();
    names.to_tree(&in_file).into_iter().zip(tensors.into_values()).collect()
}

#[test]
fn feature_maps_of_any_size_equal_transformers() -> Result<()> {
    let mut backbone = vitdet(AttentionKind::Fused)?;
    nn::checkpoint::load(&mut backbone, folder("vitdet"), &VITDET)?;
    let io = read("vitdet", "io.safetensors")?;
    let maps = backbone.feature_maps(&io["wide/pixel_values"], Mode::Eval)?;
    assert_eq!(maps.len(), 5);
    let mut worst = Worst::default();
    for (index, map) in maps.iter().enumerate() {
        worst.compare(&format!("map {index}"), map, &io[&format!("wide/maps.{index}")])?;
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

#[test]
fn adapters_come_back() -> Result<()> {
    for (mut adapted, _, name) in towers(AttentionKind::Split)? {
        let lora = LoraConfig::new(2).target_modules(["q", "v", "lin1"]);
        inject(adapted.as_mut(), &lora, 1)?;
        nn::randomize(adapted.as_mut(), 2, 0.1)?;
        let dir = tempfile::tempdir()?;
        save_adapter(adapted.as_ref(), &lora, dir.path())?;
        let again = towers(AttentionKind::Split)?.into_iter().find(|tower| tower.2 == name);
        let (mut loaded, ..) = again.expect("the same towers");
        load_adapter(loaded.as_mut(), dir.path())?;
        let state = |tower: &dyn Tower| candle_sam_lora::lora::adapter_state(tower, &lora);
        for ((key, want), (_, got)) in state(adapted.as_ref())?.iter().zip(state(loaded.as_ref())?)
        {
            assert_eq!(bits(&got)?, bits(want)?, "{name} {key}");
        }
    }
    Ok(())
}

#[test]
fn a_vitdet_comes_from_its_folder() -> Result<()> {
    let kind = AttentionKind::Fused;
    let backbone =
        VitDetBackbone::from_pretrained(folder("vitdet"), kind, DType::F32, &Device::Cpu)?;
    assert!(backbone.layers[1].residual.is_some() && backbone.layers[3].residual.is_none());
    Ok(())
}

#[test]
fn impossible_configurations_are_refused() -> Result<()> {
    let usual = VitDetConfig::load(folder("vitdet").join("config.json"))?;
    let kind = AttentionKind::Fused;
    for (config, words) in [
        (VitDetConfig { dropout_prob: 0.1, ..usual.clone() }, "dropout_prob is 0.1"),
        (VitDetConfig { drop_path_rate: 0.2, ..usual.clone() }, "drop_path_rate is 0.2"),
        (VitDetConfig { num_attention_heads: 5, ..usual.clone() }, "num_attention_heads"),
        (VitDetConfig { patch_size: 0, ..usual }, "patch_size"),
    ] {
        let error = VitDetBackbone::new(&config, kind, zeros()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let small = Tensor::zeros((1, 3, 3, 9), DType::F32, &Device::Cpu)?;
    let error = vitdet(kind)?.forward(&small, Mode::Eval).unwrap_err().to_string();
    assert!(error.contains("[B, 3, H, W]"), "{error}");
    let error = DeepseekVlHighRes::new(&config(), 0, kind, zeros()).unwrap_err().to_string();
    assert!(error.contains("side is 0"), "{error}");
    let windows = SamVisionConfig { global_attn_indexes: vec![], ..config() };
    let error = DeepseekVlHighRes::new(&windows, 3, kind, zeros()).unwrap_err().to_string();
    assert!(error.contains("global_attn_indexes"), "{error}");
    Ok(())
}
