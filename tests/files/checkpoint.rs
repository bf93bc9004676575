//! Checkpoints: names, both namings, shards, fused and split q/k/v, dtypes, and what is refused.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::nn::{
    self, Adapter, Linear, ModuleTree, Node, NodeMut, Unmerged, DEFAULT_ADAPTER,
};
use candle_sam_lora::sam::checkpoint::{
    load, save, save_pretrained, sizes, to_hugging_face, to_original, Naming, DEEPSEEK_OCR,
};
use candle_sam_lora::sam::SamConfig;
use candle_sam_lora::{files, Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SHARED: &str = "shared_image_embedding.positional_embedding";

/// A model that is nothing but names and tensors.
struct Flat(BTreeMap<String, Tensor>);

impl ModuleTree for Flat {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        for (name, tensor) in &self.0 {
            match name.as_str() {
                SHARED => f(&nn::join(path, name), Node::Buffer(tensor)),
                _ => f(&nn::join(path, name), Node::Parameter(tensor)),
            }
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        for (name, tensor) in &mut self.0 {
            match name.as_str() {
                SHARED => f(&nn::join(path, name), NodeMut::Buffer(tensor))?,
                _ => f(&nn::join(path, name), NodeMut::Parameter(tensor))?,
            }
        }
        Ok(())
    }
}

impl Flat {
    /// All zero, with the shapes of `tensors`.
    fn zeros_like(tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Self {
        let zero = |t: &Tensor| Tensor::zeros(t.dims(), dtype, &Device::Cpu).unwrap();
        Self(tensors.iter().map(|(name, t)| (name.clone(), zero(t))).collect())
    }
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

fn read(path: impl AsRef<Path>) -> BTreeMap<String, Tensor> {
    files::read_tensors(path, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_same(found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    let names = |t: &BTreeMap<String, Tensor>| t.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (name, tensor) in expected {
        assert_eq!(found[name].dims(), tensor.dims(), "{name}");
        assert_eq!(values(&found[name]), values(tensor), "{name}");
    }
}

/// A small model with every kind of name: `vision_encoder.layers.0.attn.q` and the rest.
fn small() -> BTreeMap<String, Tensor> {
    let tensor = |dims: &[usize], seed: f32| {
        let count: usize = dims.iter().product();
        let values: Vec<f32> = (0..count).map(|i| seed + i as f32 / 8.0).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    };
    [
        ("vision_encoder.patch_embed.projection.weight", vec![4, 3, 2, 2]),
        ("vision_encoder.layers.0.attn.q.weight", vec![4, 4]),
        ("vision_encoder.layers.0.attn.k.weight", vec![4, 4]),
        ("vision_encoder.layers.0.attn.v.weight", vec![4, 4]),
        ("vision_encoder.layers.0.attn.q.bias", vec![4]),
        ("vision_encoder.layers.0.attn.k.bias", vec![4]),
        ("vision_encoder.layers.0.attn.v.bias", vec![4]),
        ("vision_encoder.layers.0.attn.proj.weight", vec![4, 4]),
        ("mask_decoder.iou_prediction_head.proj_in.weight", vec![2, 4]),
        ("mask_decoder.iou_prediction_head.layers.0.weight", vec![2, 2]),
        ("mask_decoder.iou_prediction_head.layers.1.weight", vec![2, 2]),
        ("mask_decoder.iou_prediction_head.proj_out.weight", vec![3, 2]),
        (SHARED, vec![2, 2]),
    ]
    .into_iter()
    .enumerate()
    .map(|(i, (name, dims))| (name.to_string(), tensor(&dims, 10.0 * i as f32)))
    .collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    files::write_tensors(path, tensors).unwrap();
}

fn mismatch(error: Error) -> candle_sam_lora::TensorMismatch {
    match error {
        Error::Mismatch(mismatch) => *mismatch,
        other => panic!("expected a mismatch, got {other}"),
    }
}

#[test]
fn every_name_of_vit_b_translates_both_ways() {
    let table = include_str!("../data/tensor_names_vit_b.tsv");
    let rows: Vec<(&str, &str)> = table
        .lines()
        .skip(1)
        .filter(|line| !line.starts_with('('))
        .map(|line| line.split_once('\t').unwrap())
        .map(|(original, rest)| (original, rest.split_once('\t').unwrap().0))
        // Files of Hugging Face hold the shared position features under the model's own name.
        .map(|(original, hf)| match hf {
            "prompt_encoder.shared_embedding.positional_embedding" => (original, SHARED),
            _ => (original, hf),
        })
        .collect();
    assert_eq!(rows.len(), 314);
    let (original, hugging_face): (Vec<&str>, Vec<&str>) = rows.into_iter().unzip();
    assert_eq!(to_hugging_face(&original), hugging_face);
    assert_eq!(to_original(&hugging_face), original);
    assert_eq!(to_hugging_face(&hugging_face), hugging_face);
    assert_eq!(to_original(&original), original);
}

#[test]
fn head_names_follow_the_depth() {
    let head = "mask_decoder.iou_prediction_head";
    let original: Vec<String> = (0..5).map(|i| format!("{head}.layers.{i}.bias")).collect();
    let hugging_face: Vec<String> = ["proj_in", "layers.0", "layers.1", "layers.2", "proj_out"]
        .map(|layer| format!("{head}.{layer}.bias"))
        .into();
    let original: Vec<&str> = original.iter().map(String::as_str).collect();
    let hugging_face: Vec<&str> = hugging_face.iter().map(String::as_str).collect();
    for depth in [2, 3, 5] {
        let original = &original[..depth];
        let mut hf = hugging_face[..depth - 1].to_vec();
        hf.push(hugging_face[4]);
        assert_eq!(to_hugging_face(original), hf);
        assert_eq!(to_original(&hf), original);
    }
}

#[test]
fn every_layout_of_a_real_model_loads_to_the_same_tensors() {
    let split = read(model("tiny/split.safetensors"));
    let fused = read(model("tiny/model.safetensors"));
    let files =
        ["tiny", "tiny/model.safetensors", "tiny/original.safetensors", "tiny/split.safetensors"];
    for file in files {
        for expected in [&split, &fused] {
            let mut flat = Flat::zeros_like(expected, DType::F32);
            load(&mut flat, model(file)).unwrap();
            assert_same(&flat.0, expected);
        }
    }
}

#[test]
fn saved_models_equal_what_hugging_face_and_the_original_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let split = read(model("tiny/split.safetensors"));
    let flat = Flat(split);
    let path = folder.path().join("out.safetensors");
    save(&flat, &path, Naming::HuggingFace, None).unwrap();
    assert_same(&read(&path), &read(model("tiny/model.safetensors")));
    save(&flat, &path, Naming::Original, None).unwrap();
    assert_same(&read(&path), &read(model("tiny/original.safetensors")));

    let config = SamConfig::load(model("tiny/config.json")).unwrap();
    let pretrained = folder.path().join("a/b");
    save_pretrained(&flat, &config, &pretrained).unwrap();
    assert_eq!(SamConfig::load(pretrained.join("config.json")).unwrap(), config);
    let mut again = Flat::zeros_like(&flat.0, DType::F32);
    load(&mut again, &pretrained).unwrap();
    assert_same(&again.0, &flat.0);
}

#[test]
fn q_k_and_v_are_views_of_one_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save(&Flat(small()), &path, Naming::HuggingFace, None).unwrap();
    let mut flat = Flat::zeros_like(&small(), DType::F32);
    load(&mut flat, &path).unwrap();
    assert_same(&flat.0, &small());
    let starts = ["q", "k", "v"].map(|part| {
        let tensor = &flat.0[&format!("vision_encoder.layers.0.attn.{part}.weight")];
        assert!(tensor.is_contiguous());
        tensor.layout().start_offset()
    });
    assert_eq!(starts, [0, 16, 32]);
}

#[test]
fn dtypes_are_cast_to_the_models() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for stored in dtypes {
        save(&Flat(small()), &path, Naming::Original, Some(stored)).unwrap();
        for wanted in dtypes {
            let mut flat = Flat::zeros_like(&small(), wanted);
            load(&mut flat, &path).unwrap();
            for (name, tensor) in small() {
                let expected = tensor.to_dtype(stored).unwrap().to_dtype(wanted).unwrap();
                assert_eq!(flat.0[&name].dtype(), wanted);
                assert_eq!(values(&flat.0[&name]), values(&expected), "{name}");
            }
        }
    }
}

#[test]
fn variables_stay_the_variables_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save(&Flat(small()), &path, Naming::HuggingFace, None).unwrap();
    let mut flat = Flat::zeros_like(&small(), DType::F32);
    let name = "vision_encoder.layers.0.attn.v.weight";
    let var = Var::from_tensor(&flat.0[name]).unwrap();
    flat.0.insert(name.to_string(), var.as_tensor().clone());
    load(&mut flat, &path).unwrap();
    assert_eq!(values(var.as_tensor()), values(&small()[name]));
    let variables = flat.0.iter().filter(|(_, t)| t.is_variable()).map(|(n, _)| n);
    assert_eq!(variables.collect::<Vec<_>>(), [name]);
}

#[test]
fn position_features_come_under_either_name_or_both() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let inner = "prompt_encoder.shared_embedding.positional_embedding".to_string();
    let mut tensors = small();
    let features = tensors[SHARED].clone();
    let check = |tensors: &BTreeMap<String, Tensor>| {
        write(&path, tensors);
        let mut flat = Flat::zeros_like(&small(), DType::F32);
        load(&mut flat, &path).map(|_| assert_same(&flat.0, &small()))
    };
    tensors.insert(inner.clone(), features.clone());
    check(&tensors).unwrap();
    tensors.remove(SHARED);
    check(&tensors).unwrap();
    tensors.insert(SHARED.to_string(), (features + 1.0).unwrap());
    assert!(check(&tensors).unwrap_err().to_string().contains("differ"));
    tensors.remove(SHARED);
    tensors.remove(&inner);
    assert_eq!(mismatch(check(&tensors).unwrap_err()).missing, [SHARED]);
}

#[test]
fn prefixes_and_foreign_tensors_are_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let extra = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let mut wrapped: BTreeMap<String, Tensor> =
        small().into_iter().map(|(name, t)| (format!("model.sam.{name}"), t)).collect();
    wrapped.insert("model.sam.pixel_mean".into(), extra.clone());
    wrapped.insert("model.language.weight".into(), extra.clone());
    write(&path, &wrapped);
    let mut flat = Flat::zeros_like(&small(), DType::F32);
    load(&mut flat, &path).unwrap();
    assert_same(&flat.0, &small());

    // An encoder of its own, from a whole SAM and from DeepSeek-OCR's names.
    let encoder: BTreeMap<String, Tensor> = small()
        .into_iter()
        .filter_map(|(n, t)| Some((n.strip_prefix("vision_encoder.")?.to_string(), t)))
        .collect();
    let mut flat = Flat::zeros_like(&encoder, DType::F32);
    load(&mut flat, &path).unwrap();
    assert_same(&flat.0, &encoder);
    save(&flat, &path, Naming::Original, None).unwrap();
    let mut deepseek: BTreeMap<String, Tensor> = read(&path)
        .into_iter()
        .map(|(n, t)| (n.replace("image_encoder.", "model.sam_model."), t))
        .collect();
    assert!(deepseek.contains_key("model.sam_model.blocks.0.attn.qkv.weight"));
    deepseek.insert("model.sam_model.net_2.weight".into(), extra.clone());
    deepseek.insert("model.layers.0.weight".into(), extra);
    write(&path, &deepseek);
    let mut flat = Flat::zeros_like(&encoder, DType::F32);
    nn::checkpoint::load(&mut flat, &path, &DEEPSEEK_OCR).unwrap();
    assert_same(&flat.0, &encoder);
}

#[test]
fn everything_that_does_not_fit_is_listed_and_nothing_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut tensors = small();
    let shape = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    tensors.remove("vision_encoder.layers.0.attn.proj.weight");
    tensors.insert("vision_encoder.layers.7.attn.proj.weight".into(), shape(&[4, 4]));
    tensors.insert("mask_decoder.iou_prediction_head.proj_in.weight".into(), shape(&[4, 2]));
    for part in ["q", "k", "v"] {
        tensors.remove(&format!("vision_encoder.layers.0.attn.{part}.weight"));
    }
    tensors.insert("vision_encoder.layers.0.attn.qkv.weight".into(), shape(&[9, 4]));
    write(&path, &tensors);
    let mut flat = Flat::zeros_like(&small(), DType::F32);
    let found = mismatch(load(&mut flat, &path).unwrap_err());
    assert_eq!(found.missing, ["vision_encoder.layers.0.attn.proj.weight"]);
    assert_eq!(found.surplus, ["vision_encoder.layers.7.attn.proj.weight"]);
    let iou = "mask_decoder.iou_prediction_head.proj_in.weight".to_string();
    let qkv = "vision_encoder.layers.0.attn.qkv.weight".to_string();
    assert_eq!(found.misshaped, [(iou, vec![2, 4], vec![4, 2]), (qkv, vec![12, 4], vec![9, 4])]);
    assert!(flat.0.values().all(|t| values(t).iter().all(|v| *v == 0.0)));
}

#[test]
fn nan_infinity_overflow_and_integers_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let name = "vision_encoder.layers.0.attn.proj.weight";
    let check = |tensor: Tensor, dtype: DType, expected: &str| {
        let mut tensors = small();
        tensors.insert(name.to_string(), tensor);
        write(&path, &tensors);
        let mut flat = Flat::zeros_like(&small(), dtype);
        let message = load(&mut flat, &path).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains(expected), "{message}");
        assert!(flat.0.values().all(|t| values(t).iter().all(|v| *v == 0.0)));
    };
    let filled = |value: f32| Tensor::full(value, (4, 4), &Device::Cpu).unwrap();
    check(filled(f32::NAN), DType::F32, "NaN");
    check(filled(f32::INFINITY).to_dtype(DType::BF16).unwrap(), DType::F32, "NaN or infinite");
    check(filled(1e6), DType::F16, "too large for F16");
    check(filled(1.0).to_dtype(DType::I64).unwrap(), DType::F32, "I64");
}

#[test]
fn shards_load_and_their_index_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let split = read(model("tiny/model.safetensors"));
    let (mut one, mut two, mut map) = (BTreeMap::new(), BTreeMap::new(), serde_json::Map::new());
    for (i, (name, tensor)) in split.iter().enumerate() {
        let (shard, file) = match i % 2 {
            0 => (&mut one, "model-00001-of-00002.safetensors"),
            _ => (&mut two, "model-00002-of-00002.safetensors"),
        };
        shard.insert(name.clone(), tensor.clone());
        map.insert(name.clone(), file.into());
    }
    write(&folder.path().join("model-00001-of-00002.safetensors"), &one);
    write(&folder.path().join("model-00002-of-00002.safetensors"), &two);
    let index = |map: &serde_json::Map<String, serde_json::Value>| {
        let json = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(folder.path().join("model.safetensors.index.json"), json.to_string())
    };
    let try_load = || {
        let mut flat = Flat::zeros_like(&split, DType::F32);
        load(&mut flat, folder.path()).map(|_| assert_same(&flat.0, &split))
    };
    index(&map).unwrap();
    try_load().unwrap();
    let mut wrong = map.clone();
    wrong.insert("ghost".into(), "model-00001-of-00002.safetensors".into());
    index(&wrong).unwrap();
    assert!(try_load().unwrap_err().to_string().contains("ghost"));
    for escape in
        ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "", ".", "..\\x.safetensors"]
    {
        map.insert("ghost".into(), escape.into());
        index(&map).unwrap();
        let message = try_load().unwrap_err().to_string();
        assert!(message.contains("not the name of a safetensors file"), "{escape}: {message}");
    }
}

/// Linear layers under the names of an attention, one of them with an adapter.
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
}
candle_sam_lora::module_tree!(Attention { q => "layers.0.attn.q", k => "layers.0.attn.k", v => "layers.0.attn.v" });

#[test]
fn adapters_are_no_part_of_a_base_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let linear = || Linear::load(4, 4, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
    let ones = |dims: (usize, usize)| Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap();
    let mut model = Attention { q: linear(), k: linear(), v: linear() };
    model.k.weight = ones((4, 4));
    let adapter = Adapter {
        a: ones((2, 4)),
        b: ones((4, 2)),
        b_bias: None,
        magnitude: None,
        scaling: 1.0,
        dropout: 0.0,
        stream: 0,
        changes_base: false,
    };
    model.q.put_adapter("q", adapter);
    save(&model, &path, Naming::HuggingFace, None).unwrap();
    let saved = read(&path);
    assert_eq!(
        saved.keys().collect::<Vec<_>>(),
        ["layers.0.attn.qkv.bias", "layers.0.attn.qkv.weight"]
    );
    let rows: Vec<f32> = values(&saved["layers.0.attn.qkv.weight"]);
    assert_eq!((rows[0], rows[16], rows[32]), (0.0, 1.0, 0.0));
    model.k.weight = linear().weight;
    load(&mut model, &path).unwrap();
    assert_eq!(values(&model.k.weight), [1.0; 16]);
    assert_eq!(values(&model.q.adapters.get(DEFAULT_ADAPTER).unwrap().a), [1.0; 8]);

    let (weight, bias) = (model.q.weight.clone(), model.q.bias.clone());
    model.q.adapters.unmerged = Some(Unmerged { names: vec![], weight, bias });
    assert!(load(&mut model, &path).unwrap_err().to_string().contains("merged"));
}

#[test]
fn paths_that_hold_no_checkpoint_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut flat = Flat(small());
    let mut message = |path: PathBuf| load(&mut flat, path).unwrap_err().to_string();
    assert!(message(folder.path().into()).contains("expected weights: model.safetensors"));
    assert!(message(folder.path().join("nothing.safetensors")).contains("nothing.safetensors"));
    assert!(message(folder.path().join("sam_vit_b.pth")).contains("sam_vit_b.pth: No such file"));
    for number in [1, 2] {
        let part = format!("model-0000{number}-of-00002.safetensors");
        write(&folder.path().join(part), &BTreeMap::new());
    }
    let error = message(folder.path().into());
    assert!(error.contains("parts of a checkpoint") && error.contains("index.json"), "{error}");
    let other = folder.path().join("other.safetensors");
    let name = "image_encoder.trunk.patch_embed.proj.bias".to_string();
    write(&other, &BTreeMap::from([(name, Tensor::ones(1, DType::F32, &Device::Cpu).unwrap())]));
    let error = sizes(&other).unwrap_err().to_string();
    assert!(error.contains("no image encoder of a SAM") && error.contains("SAM 2"), "{error}");
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let into_file = save(&Flat(small()), blocked.join("x.safetensors"), Naming::HuggingFace, None);
    assert!(into_file.unwrap_err().to_string().contains("x.safetensors"));
}

#[cfg(unix)]
#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    std::fs::write(&path, "old").unwrap();
    let fail = |file: &mut dyn std::io::Write| {
        file.write_all(b"new")?;
        Err(std::io::Error::other("disk full"))
    };
    assert!(files::write_atomic(&path, fail).unwrap_err().to_string().contains("disk full"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    files::write_atomic(&path, |file| file.write_all(b"new")).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
    // As readable as any file the user makes here.
    std::fs::write(folder.path().join("y"), "").unwrap();
    let mode = |name: &str| folder.path().join(name).metadata().unwrap().permissions().mode();
    assert_eq!(mode("x"), mode("y"));
}
