//! Files made to hurt. Whatever the bytes, a loader answers with an error that names the file, or with what the file
//! truly holds. It neither panics nor allocates what a header merely claims.

use crate::common::property;
use crate::common::small::Small;
use candle_core::{Device, Tensor};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::sam::checkpoint::{load, to_hugging_face, to_original};
use candle_sam_lora::sam::{read_image, SamConfig, SamProcessor};
use candle_sam_lora::{files, nn};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// A checkpoint that fits [`Small`].
fn good() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let tensors: BTreeMap<String, Tensor> = nn::named_parameters(&Small::new())
        .into_iter()
        .map(|(name, tensor)| (name, (tensor + 1.5).unwrap()))
        .collect();
    files::write_tensors(&path, &tensors).unwrap();
    std::fs::read(path).unwrap()
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Writes `bytes` to a file and hands its path over.
fn in_file<T>(name: &str, bytes: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    read(&path)
}

/// Tries every reader of tensors on the bytes; true if the checkpoint was accepted.
fn try_tensors(bytes: &[u8]) -> bool {
    in_file("model.safetensors", bytes, |path| {
        if let Ok(tensors) = files::read_tensors(path, &Device::Cpu) {
            let size: usize =
                tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
            // U16 is widened to u32, no other dtype grows.
            assert!(size <= 2 * bytes.len());
        }
        let mut model = Small::new();
        let before = model.values();
        match load(&mut model, path) {
            Ok(_) => true,
            Err(error) => {
                assert!(error.to_string().contains("model.safetensors"), "{error}");
                assert_eq!(model.values(), before);
                false
            }
        }
    })
}

#[test]
fn the_good_file_is_good() {
    assert!(try_tensors(&good()));
}

#[test]
fn headers_that_lie_are_refused() {
    let huge = u64::MAX.to_le_bytes();
    let entry = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    let cases = [
        ("no bytes", vec![]),
        ("seven bytes", vec![0; 7]),
        ("header of 2^64", huge.to_vec()),
        ("header of 2^40", (1u64 << 40).to_le_bytes().to_vec()),
        ("header beyond the end", [&100u64.to_le_bytes()[..], b"{}"].concat()),
        ("empty header", with_header("", 0)),
        ("no object", with_header("[]", 0)),
        ("no utf-8", [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()),
        ("deep JSON", with_header(&r#"{"a":"#.repeat(50_000), 0)),
        ("deep list", with_header(&format!("{{\"a\":{}", "[".repeat(50_000)), 0)),
        ("data missing", with_header(&entry("[2]", "[0,8]"), 4)),
        ("data left over", with_header(&entry("[2]", "[0,8]"), 12)),
        ("terabytes", with_header(&entry("[1099511627776]", "[0,4398046511104]"), 8)),
        ("overflowing shape", with_header(&entry("[4294967296,4294967296,4]", "[0,8]"), 8)),
        ("overflowing empty shape", with_header(&entry("[0,4294967296,4294967296]", "[0,0]"), 0)),
        ("shape against offsets", with_header(&entry("[3]", "[0,8]"), 8)),
        ("backward offsets", with_header(&entry("[2]", "[8,0]"), 8)),
        ("negative shape", with_header(&entry("[-2]", "[0,8]"), 8)),
        ("overlap", with_header(&two("[0,8]", "[4,12]"), 12)),
        ("same place", with_header(&two("[0,8]", "[0,8]"), 8)),
        ("gap", with_header(&two("[0,8]", "[12,20]"), 20)),
        (
            "offsets of 2^64",
            with_header(&two("[0,8]", "[18446744073709551608,18446744073709551615]"), 8),
        ),
        ("one name twice", with_header(&two("[0,8]", "[0,8]").replace("\"b\"", "\"a\""), 8)),
        ("unknown dtype", with_header(&entry("[2]", "[0,8]").replace("F32", "F31"), 8)),
        ("dtype without support", with_header(&entry("[16]", "[0,8]").replace("F32", "F4"), 8)),
    ];
    for (what, bytes) in cases {
        in_file("x.safetensors", &bytes, |path| {
            let error = files::read_tensors(path, &Device::Cpu).expect_err(what);
            assert!(error.to_string().contains("x.safetensors"), "{what}: {error}");
        });
        assert!(!try_tensors(&bytes), "{what}");
    }
}

#[test]
fn a_folder_is_no_file() {
    let folder = tempfile::tempdir().unwrap();
    assert!(files::read_tensors(folder.path(), &Device::Cpu).is_err());
    assert!(files::read_text(folder.path()).is_err());
    assert!(SamConfig::load(folder.path()).is_err());
    assert!(read_image(folder.path()).is_err());
}

/// A device, as /dev/null, stays what it is for all programs.
#[cfg(unix)]
#[test]
fn no_file_replaces_a_device() -> anyhow::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mask.png");
    let _socket = std::os::unix::net::UnixListener::bind(&path)?;
    let error = candle_sam_lora::write_atomic(&path, |_| Ok(())).expect_err("a socket");
    assert!(error.to_string().contains("mask.png: is a folder, device or pipe"), "{error}");
    assert!(std::fs::metadata(&path)?.file_type().is_socket());
    Ok(())
}

/// The value that is wrong is shown: numbers of lines alone say little.
#[test]
fn errors_in_json_show_the_value() {
    let json = "{\n  \"peft_type\": \"LORA\",\n  \"bias\": null\n}";
    let error = in_file("adapter_config.json", json.as_bytes(), |path| LoraConfig::load(path));
    let error = error.expect_err("no bias").to_string();
    assert!(error.contains("adapter_config.json: not a LoRA configuration"), "{error}");
    assert!(error.contains("line 3") && error.contains("after `\"bias\":"), "{error}");
}

/// Positions and bytes to overwrite, where to cut, and what to append.
/// Not by the name of a temporary file, which is no matter of the user's.
#[test]
fn a_folder_that_is_not_there_is_named() -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("outputs").tempdir()?;
    let nowhere = folder.path().join("nowhere");
    let written = candle_sam_lora::write_atomic(nowhere.join("adapter.safetensors"), |_| Ok(()));
    let error = written.expect_err("there is no folder").to_string();
    assert!(error.ends_with(&format!("there is no folder {}", nowhere.display())), "{error}");
    assert!(!error.contains(".tmp"), "{error}");
    Ok(())
}

fn damage() -> impl Strategy<Value = (Vec<(usize, u8)>, usize, Vec<u8>)> {
    let writes = prop::collection::vec((any::<usize>(), any::<u8>()), 0..6);
    (writes, any::<usize>(), prop::collection::vec(any::<u8>(), 0..20))
}

fn damaged(mut bytes: Vec<u8>, damage: (Vec<(usize, u8)>, usize, Vec<u8>)) -> Vec<u8> {
    let (writes, cut, appended) = damage;
    for (position, value) in writes {
        let position = position % bytes.len();
        bytes[position] = value;
    }
    // Two files in three keep their length.
    if cut % 3 == 0 {
        bytes.truncate(cut / 3 % (bytes.len() + 1));
        bytes.extend(appended);
    }
    bytes
}

/// A JSON value of the kinds configurations are made of, and of the kinds they are not.
fn json() -> impl Strategy<Value = serde_json::Value> {
    prop_oneof![
        any::<u64>().prop_map(Into::into),
        (0u64..70).prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        any::<bool>().prop_map(Into::into),
        "[a-z]{0,5}".prop_map(Into::into),
        Just(serde_json::Value::Null),
        prop::collection::vec(any::<u32>(), 0..4).prop_map(Into::into),
    ]
}

const FIELDS: [&str; 20] = [
    "hidden_size",
    "output_channels",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "qkv_bias",
    "mlp_ratio",
    "window_size",
    "global_attn_indexes",
    "num_pos_feats",
    "mlp_dim",
    "mask_input_channels",
    "attention_downsample_rate",
    "iou_head_depth",
    "iou_head_hidden_dim",
];

proptest! {
    #![proptest_config(property::config(400))]

    #[test]
    fn damaged_tensors_never_panic(damage in damage()) {
        let original = good();
        let bytes = damaged(original.clone(), damage);
        // Accepted is only what is whole: same header, and data that may differ in value alone.
        if try_tensors(&bytes) {
            prop_assert_eq!(bytes.len(), original.len());
        }
    }

    #[test]
    fn random_bytes_are_no_tensors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(!try_tensors(&bytes));
    }

    #[test]
    fn random_headers_never_panic(
        dtype in prop::sample::select(vec!["F32", "F16", "BF16", "F64", "I64", "U8", "U16", "BOOL", "F8_E4M3", "F4", "C64"]),
        shape in prop::collection::vec(prop_oneof![0u64..5, any::<u64>()], 0..5),
        start in 0u64..9,
        length in prop_oneof![0u64..40, any::<u64>()],
        data in 0usize..40,
    ) {
        let header = serde_json::json!({
            "layers.0.attn.q.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, start.saturating_add(length)]}
        });
        prop_assert!(!try_tensors(&with_header(&header.to_string(), data)));
    }

    #[test]
    fn every_valid_configuration_is_small_enough(
        part in prop::sample::select(vec!["vision_config", "prompt_encoder_config", "mask_decoder_config"]),
        changes in prop::collection::btree_map(prop::sample::select(FIELDS.to_vec()), json(), 0..5),
    ) {
        let text = serde_json::json!({part: changes}).to_string();
        if let Ok(config) = in_file("config.json", text.as_bytes(), |path| SamConfig::load(path)) {
            let v = &config.vision_config;
            prop_assert_eq!(v.head_dim() * v.num_attention_heads, v.hidden_size);
            prop_assert_eq!(v.grid_size() * v.patch_size, v.image_size);
            prop_assert!(v.num_hidden_layers * v.hidden_size * (4 * v.hidden_size + 2 * v.mlp_dim()) <= 1 << 32);
            // An accepted configuration is written and read back as it was.
            let again: SamConfig = serde_json::from_str(&config.to_json().unwrap()).unwrap();
            prop_assert_eq!(again.vision_config.mlp_dim(), v.mlp_dim());
            prop_assert_eq!(again.mask_decoder_config.mlp_dim, config.mask_decoder_config.mlp_dim);
            prop_assert_eq!(&again.vision_config.global_attn_indexes, &v.global_attn_indexes);
        }
    }

    #[test]
    fn damaged_json_never_panics(damage in damage()) {
        let config = SamConfig::vit_h().to_json().unwrap().into_bytes();
        let bytes = damaged(config, damage);
        in_file("config.json", &bytes, |path| {
            if let Err(error) = SamConfig::load(path) {
                assert!(error.to_string().contains("config.json"), "{error}");
            }
        });
        let _ = in_file("preprocessor_config.json", &bytes, |path| {
            SamProcessor::load(path.parent().unwrap(), 1024)
        });
        in_file("model.safetensors.index.json", &bytes, |path| {
            assert!(load(&mut Small::new(), path.parent().unwrap()).is_err());
        });
    }

    #[test]
    fn names_of_any_kind_translate_without_panic_or_collision(
        names in prop::collection::btree_set(
            prop_oneof![
                "[a-z.#*0-9]{0,20}",
                r"mask_decoder\.(output_hypernetworks_mlps\.[0-9]{1,12}|iou_prediction_head)\.(layers\.[0-9]{1,22}|proj_in|proj_out)\.[a-z.]{0,4}",
                r"(image|vision)_encoder\.(blocks|layers)\.[0-9]{1,22}\.(norm1|layer_norm1|attn)\.[a-z.]{0,4}",
            ],
            0..8,
        ),
    ) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for translated in [to_hugging_face(&names), to_original(&names)] {
            prop_assert_eq!(translated.len(), names.len());
        }
    }

    #[test]
    fn damaged_images_never_panic(damage in damage(), format in 0usize..5) {
        let formats = [
            image::ImageFormat::Png, image::ImageFormat::Tiff, image::ImageFormat::Bmp, image::ImageFormat::WebP,
            image::ImageFormat::Gif,
        ];
        let pixels = image::RgbaImage::from_fn(9, 7, |x, y| image::Rgba([x as u8 * 9, y as u8 * 9, 7, 255]));
        let mut bytes = std::io::Cursor::new(Vec::new());
        pixels.write_to(&mut bytes, formats[format]).unwrap();
        let bytes = damaged(bytes.into_inner(), damage);
        in_file("image", &bytes, |path| match read_image(path) {
            Ok(image) if image.width().max(image.height()) <= 4096 => {
                let _ = SamProcessor::new(16).preprocess(&image, &Device::Cpu);
            }
            Ok(_) => {}
            Err(error) => assert!(error.to_string().contains("image"), "{error}"),
        });
    }
}

/// Found by fuzzing: the decoder panics on a palette that ends within a colour.
#[test]
fn an_image_that_its_decoder_panics_on_is_an_error() {
    #[rustfmt::skip]
    let png: [u8; 151] = [
        0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00, 0x00, 0x07, 0x00, 0x00, 0x00, 0x05,
        0x01, 0x03, 0x00, 0x00, 0x00, 0xb3, 0x8e, 0x64, 0x9b, 0x00, 0x00, 0x00, 0x5b, 0x50, 0x4c, 0x54, 0x45, 0x00, 0x00, 0x08, 0xa7, 0x7a, 0x3d, 0xda,
        0x00, 0x00, 0x00, 0x12, 0x49, 0x44, 0x41, 0x54, 0x78, 0x9c, 0x63, 0x60, 0x60, 0x60, 0x62, 0xef, 0x0c, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x66,
        0x49, 0x46, 0x46, 0x40, 0x00, 0x3a, 0x00, 0x00, 0x57, 0x45, 0x42, 0x50, 0x56, 0x50, 0x36, 0x20, 0x34, 0x00, 0x48, 0x26, 0x40, 0x00, 0xff, 0x0a,
        0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00, 0x00, 0x07, 0x00, 0x00, 0x00, 0x05, 0x01, 0x03, 0x00, 0x00, 0x00, 0xb3, 0x8e, 0x64,
        0x9b, 0x00, 0x00, 0x00, 0x5b, 0x50, 0x4c, 0x54, 0x45, 0x00, 0x00, 0x08, 0xa7, 0x7a, 0x3d, 0xda, 0x00, 0x00, 0x00, 0x12, 0x49, 0x44, 0x41, 0x54,
        0x78, 0x9c, 0x63, 0x60, 0x60, 0x60, 0x82,
    ];
    let error = in_file("x.png", &png, |path: &Path| read_image(path)).unwrap_err().to_string();
    assert!(error.contains("x.png: cannot be read as an image"), "{error}");
}

/// Found by fuzzing: the engine makes room for every group up to the one that is referred to, and aborts without it.
#[test]
fn a_pattern_cannot_ask_for_memory_by_a_number() {
    let pattern = r".*\xeft_type.(?P>00000000000014710992060452933175)";
    let lora = LoraConfig::new(2).target_regex(pattern);
    let error = inject(&mut Small::new(), &lora, 0).unwrap_err().to_string();
    assert!(error.contains("more than 4 digits"), "{error}");
}

/// Tensors of zeros of these names and shapes: a file that has every byte its header claims, and takes no disk.
#[cfg(target_os = "linux")]
fn sparse(path: &Path, tensors: &[(&str, &[u64])]) {
    let (mut entries, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<u64>();
        let entry =
            serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        entries.insert(name.to_string(), entry);
    }
    let header = with_header(&serde_json::Value::from(entries).to_string(), 0);
    std::fs::write(path, &header).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(header.len() as u64 + end).unwrap();
}

/// Tensors that truly have a terabyte are refused by the header, before any is read.
#[cfg(target_os = "linux")]
#[test]
fn huge_files_are_refused_by_their_headers() {
    use candle_sam_lora::lora::{hotswap_adapter, load_adapter, save_adapter, TENSORS_FILE};
    const HUGE: u64 = 1 << 38;
    let folder = tempfile::tempdir().unwrap();
    let is_mismatch = |what: &str, error: candle_sam_lora::Error| {
        assert!(matches!(error, candle_sam_lora::Error::Mismatch(_)), "{what}: {error}");
    };

    let lora = LoraConfig::new(2).target_modules(["q"]);
    let mut adapted = Small::new();
    inject(&mut adapted, &lora, 0).unwrap();
    save_adapter(&adapted, &lora, folder.path()).unwrap();
    let [a, b] = ["A", "B"].map(|m| format!("base_model.model.layers.0.attn.q.lora_{m}.weight"));
    let (good_a, good_b): (&[u64], &[u64]) = (&[2, 4], &[2, 2]);
    for (what, tensors) in [
        ("wide", vec![(&a[..], &[2, HUGE / 2][..]), (&b[..], good_b)]),
        ("surplus", vec![(&a[..], good_a), (&b[..], good_b), ("c", &[HUGE])]),
    ] {
        sparse(&folder.path().join(TENSORS_FILE), &tensors);
        let mut model = Small::new();
        let before = model.values();
        is_mismatch(what, load_adapter(&mut model, folder.path()).unwrap_err());
        assert_eq!(model.values(), before);
        is_mismatch(what, hotswap_adapter(&mut adapted, "default", folder.path()).unwrap_err());
    }
    // The same files with shapes that fit do load.
    sparse(&folder.path().join(TENSORS_FILE), &[(&a, good_a), (&b, good_b)]);
    load_adapter(&mut Small::new(), folder.path()).unwrap();
    hotswap_adapter(&mut adapted, "default", folder.path()).unwrap();

    let weights: [(&str, &[u64]); 4] = [
        ("layers.0.attn.q.weight", &[2, 4]),
        ("layers.0.attn.q.bias", &[2]),
        ("neck.layer_norm1.weight", &[3]),
        ("neck.layer_norm1.bias", &[3]),
    ];
    let path = folder.path().join("model.safetensors");
    sparse(&path, &weights);
    load(&mut Small::new(), &path).unwrap();
    let mut wide = weights;
    wide[0].1 = &[2, HUGE / 2];
    let mut twice = weights.to_vec();
    twice.push(("shared_image_embedding.positional_embedding", &[HUGE / 4]));
    twice.push(("prompt_encoder.shared_embedding.positional_embedding", &[HUGE / 4]));
    for (what, tensors) in [("wide", &wide[..]), ("twice", &twice)] {
        sparse(&path, tensors);
        is_mismatch(what, load(&mut Small::new(), &path).unwrap_err());
    }
}

/// A training state that truly has a terabyte is refused by its header, too.
#[cfg(target_os = "linux")]
#[test]
fn huge_states_are_refused_by_their_headers() {
    use candle_sam_lora::train::{AdamWConfig, Trainer, TrainerConfig};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut model = Small::new();
    candle_sam_lora::nn::set_trainable(&mut model, |_| true).unwrap();
    let mut trainer =
        Trainer::new(&model, TrainerConfig { seed: 1, ..AdamWConfig::default().into() }).unwrap();
    sparse(&path, &[("parameter.layers.0.attn.q.weight", &[1 << 38])]);
    let error = trainer.resume(&path).unwrap_err().to_string();
    // 16 parameters with two moments each.
    let said = "1099511627776 bytes of tensors; a state of this model has 192";
    assert!(error.contains(said), "{error}");
}
