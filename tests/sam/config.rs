//! `SamConfig`: Hugging Face's defaults, its files, and what is refused.

use candle_core::{DType, Device, Tensor};
use candle_sam_lora::files::{read_tensors, write_tensors};
use candle_sam_lora::nn::named_parameters;
use candle_sam_lora::sam::{checkpoint, AttentionKind, HiddenAct, SamConfig, SamVisionModel};
use std::collections::BTreeMap;

fn parse(json: &str) -> Result<SamConfig, String> {
    let config: SamConfig = serde_json::from_str(json).map_err(|e| e.to_string())?;
    config.validate().map_err(|e| e.to_string())?;
    Ok(config)
}

fn refused(json: &str, expected: &str) {
    let message = parse(json).expect_err(json);
    assert!(message.contains(expected), "{json}: {message:?} does not say {expected:?}");
}

#[test]
fn absent_keys_have_hugging_faces_defaults() {
    for json in ["{}", r#"{"vision_config": null, "mask_decoder_config": {}}"#] {
        assert_eq!(parse(json).unwrap(), SamConfig::vit_b());
    }
    let v = SamConfig::vit_b().vision_config;
    assert_eq!((v.hidden_size, v.mlp_dim(), v.grid_size(), v.head_dim()), (768, 3072, 64, 64));
    assert_eq!((v.window(0), v.window(2)), (Some(14), None));
    assert_eq!((v.rel_pos_len(0), v.rel_pos_len(2)), (27, 127));
    let h = SamConfig::by_name("vit_h").unwrap().vision_config;
    assert_eq!((h.head_dim(), h.mlp_dim(), h.num_hidden_layers), (80, 5120, 32));
    for name in ["vit_b", "vit_l", "vit_h"] {
        SamConfig::by_name(name).unwrap().validate().unwrap();
    }
    assert!(SamConfig::by_name("vit_x").unwrap_err().to_string().contains("vit_x"));
}

#[test]
fn a_written_configuration_reads_back_with_its_unknown_keys() {
    let json = r#"{
        "model_type": "sam", "dtype": "float16",
        "vision_config": {
            "hidden_size": 64, "num_attention_heads": 4, "image_size": [256, 256], "patch_size": 16,
            "mlp_ratio": 2, "attention_dropout": 0, "global_attn_indexes": [1, 99], "scale": 32, "hidden_act": "relu"
        },
        "prompt_encoder_config": {"image_size": 256, "image_embedding_size": 16}
    }"#;
    let config = parse(json).unwrap();
    assert_eq!(config.vision_config.mlp_dim(), 128);
    assert_eq!(config.vision_config.image_size, 256);
    assert_eq!(config.vision_config.hidden_act, HiddenAct::Relu);
    assert_eq!(config.extra["dtype"], "float16");
    assert_eq!(config.prompt_encoder_config.extra["image_embedding_size"], 16);
    let mut again = parse(&config.to_json().unwrap()).unwrap();
    assert_eq!(again.vision_config.mlp_dim.take(), Some(128));
    again.extra.shift_remove("architectures").unwrap();
    assert_eq!(again, config);
}

#[test]
fn indexes_of_no_layer_make_none_global() {
    let config =
        parse(r#"{"vision_config": {"global_attn_indexes": [-1, 0, 12]}}"#).unwrap().vision_config;
    let global: Vec<usize> = (0..12).filter(|&layer| config.window(layer).is_none()).collect();
    assert_eq!(global, [0]);
}

#[test]
fn impossible_configurations_are_refused_by_field() {
    let vision = |field: &str| format!(r#"{{"vision_config": {{{field}}}}}"#);
    let decoder = |field: &str| format!(r#"{{"mask_decoder_config": {{{field}}}}}"#);
    for (json, expected) in [
        (vision(r#""num_attention_heads": 7"#), "multiple of num_attention_heads 7"),
        (vision(r#""num_attention_heads": 0"#), "num_attention_heads is 0"),
        (vision(r#""image_size": 1000"#), "image_size is 1000"),
        (vision(r#""image_size": 512"#), "they must be equal"),
        (vision(r#""image_size": [512, 256]"#), "not square"),
        (vision(r#""image_size": "big""#), "expected a size"),
        (vision(r#""patch_size": 0"#), "patch_size is 0"),
        (vision(r#""hidden_act": "prelu""#), "prelu"),
        (vision(r#""image_size": 8"#), "less than a patch of 16"),
        (vision(r#""hidden_size": -1"#), "-1"),
        (vision(r#""hidden_size": 18446744073709551615"#), "hidden_size is 18446744073709551615"),
        (vision(r#""mlp_ratio": 1e300"#), "mlp_dim"),
        (vision(r#""hidden_size": 12288, "num_hidden_layers": 65536"#), "parameters"),
        (vision(r#""window_size": 60000"#), "window_size is 60000"),
        (vision(r#""layer_norm_eps": 0"#), "layer_norm_eps"),
        (vision(r#""attention_dropout": 1.0"#), "attention_dropout"),
        (vision(r#""output_channels": 128"#), "output_channels is 128"),
        (
            decoder(r#""num_attention_heads": 3"#),
            "256 channels, expected a multiple of num_attention_heads 3",
        ),
        (decoder(r#""attention_downsample_rate": 64"#), "4 channels, expected a multiple"),
        (decoder(r#""attention_downsample_rate": 512"#), "0 channels, expected a multiple"),
        (decoder(r#""attention_downsample_rate": 0"#), "attention_downsample_rate is 0"),
        (r#"{"model_type": "bert"}"#.into(), "bert"),
        (
            r#"{"model_type": "sam_vision_model"}"#.into(),
            "without the prompt encoder and the mask decoder",
        ),
    ] {
        refused(&json, expected);
    }
    assert!(parse(&"[".repeat(100_000)).is_err());
    assert!(parse(&r#"{"x":"#.repeat(100_000)).is_err());
}

/// Without a `config.json`: whole, alone, in either naming, below a prefix, two in one file.
#[test]
fn image_encoders_load_from_any_weights() -> anyhow::Result<()> {
    let encoder = |path: &std::path::Path| {
        SamVisionModel::from_pretrained(path, AttentionKind::Fused, DType::F32, &Device::Cpu)
    };
    let values = |model: &SamVisionModel| -> anyhow::Result<Vec<f32>> {
        let named = named_parameters(model);
        let all = named.iter().map(|(_, tensor)| Ok(tensor.flatten_all()?.to_vec1::<f32>()?));
        Ok(all.collect::<anyhow::Result<Vec<_>>>()?.concat())
    };
    let shipped = std::path::Path::new("assets/tiny-sam");
    let expected = encoder(shipped)?;
    let tensors = read_tensors(shipped.join("model.safetensors"), &Device::Cpu)?;
    let renamed = |rename: &dyn Fn(&str) -> Option<String>| -> BTreeMap<String, Tensor> {
        let kept = tensors.iter().filter_map(|(name, t)| Some((rename(name)?, t.clone())));
        kept.collect()
    };
    let alone = |name: &str| name.starts_with("vision_encoder.").then(|| name.to_string());
    let original = |name: &str| checkpoint::to_original(&[name]).swap_remove(0);
    let mut two = renamed(&|name| Some(format!("teacher.{name}")));
    two.extend(renamed(&|name| Some(format!("student.{name}"))));
    let folder = tempfile::tempdir()?;
    for (file, choice, tensors) in [
        ("whole.safetensors", "", tensors.clone()),
        ("encoder.safetensors", "", renamed(&alone)),
        (
            "original.safetensors",
            "",
            renamed(&|name| Some(original(&alone(name)?).replace("image_encoder.", ""))),
        ),
        ("wrapped.safetensors", "", renamed(&|name| Some(format!("module.{}", alone(name)?)))),
        ("two.safetensors", "#teacher", two),
    ] {
        let path = folder.path().join(file);
        write_tensors(&path, &tensors)?;
        let loaded = encoder(&folder.path().join(format!("{file}{choice}")))?;
        assert_eq!(values(&loaded)?, values(&expected)?, "{file}");
        if choice.is_empty() {
            let only = tempfile::tempdir()?;
            std::fs::copy(&path, only.path().join(file))?;
            assert_eq!(values(&encoder(only.path())?)?, values(&expected)?, "a folder of {file}");
        }
    }
    let error = encoder(&folder.path().join("two.safetensors")).expect_err("two").to_string();
    assert!(error.contains("two.safetensors#student"), "{error}");
    Ok(())
}
