//! Files as `torch.save` writes them, against the values that PyTorch put in: tests/fixtures/gen/torch_files.py.

use crate::common::small::Small;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::nn::checkpoint::{load, Fused, Loaded, Names};
use candle_sam_lora::nn::{self, ModuleTree, Node, NodeMut};
use candle_sam_lora::{files, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch").join(name)
}

fn expected() -> BTreeMap<String, Vec<f32>> {
    let tensors = files::read_tensors(fixture("expected.safetensors"), &Device::Cpu).unwrap();
    tensors
        .into_iter()
        .map(|(name, t)| (name, t.flatten_all().unwrap().to_vec1().unwrap()))
        .collect()
}

fn loaded(name: &str) -> Loaded {
    let mut model = Small::new();
    let loaded = load(&mut model, fixture(name), &Names::PLAIN).unwrap();
    assert_eq!(model.values(), expected(), "{name}");
    loaded
}

fn refused(name: &str, words: &[&str]) {
    let mut model = Small::new();
    let error = load(&mut model, fixture(name), &Names::PLAIN).unwrap_err().to_string();
    for word in words.iter().chain([&name]) {
        assert!(error.contains(word), "{name}: {word}: {error}");
    }
    assert!(model.values().values().flatten().all(|v| *v == 0.0 || *v == 1.0), "{name}");
}

#[test]
fn every_way_of_saving_a_model_loads_to_the_same_values() {
    for (name, prefix, passed_over) in [
        ("bare", "", 0),
        ("model_ddp_optimizer", "model.module.", 12),
        ("nested", "runs.0.net.state_dict.backbone.", 0),
        ("bare_and_optimizer", "", 12),
        ("dtypes", "", 0),
        ("shared_storage", "", 0),
        ("strided", "", 0),
        ("parameters", "", 0),
        ("whole_module", "", 0),
        ("protocol_4", "model.", 0),
        ("protocol_5", "model.", 0),
        ("unknown_classes", "state_dict.", 3),
        ("big_endian", "", 0),
    ] {
        let loaded = loaded(&format!("{name}.pth"));
        let found = (loaded.prefix.as_str(), loaded.passed_over, loaded.format);
        assert_eq!(found, (prefix, passed_over, "PyTorch"), "{name}");
        assert!(!loaded.to_string().contains('\n'));
    }
}

#[test]
fn two_models_in_one_file_are_told_apart_or_refused() {
    refused("two_models.pth", &["2 models", "\"student.\"", "\"teacher.\""]);
    assert_eq!(loaded("bare_and_ema.pth").others, ["ema."]);
    refused("two_models.pth", &["two_models.pth#student"]);
    for (name, prefix) in [
        ("two_models.pth#teacher", "teacher."),
        ("two_models.pth#teacher.", "teacher."),
        ("bare_and_ema.pth#", ""),
    ] {
        assert_eq!(loaded(name).prefix, prefix, "{name}");
    }
    let mut other = Small::new();
    for name in ["two_models.pth#student", "bare_and_ema.pth#ema"] {
        load(&mut other, fixture(name), &Names::PLAIN).unwrap();
        let shifted =
            |(name, values): (String, Vec<f32>)| (name, values.iter().map(|v| v + 1.0).collect());
        assert_eq!(other.values(), expected().into_iter().map(shifted).collect(), "{name}");
    }
    let nobody =
        load(&mut other, fixture("two_models.pth#nobody"), &Names::PLAIN).unwrap_err().to_string();
    for word in ["\"nobody\"", "\"student.\"", "\"teacher.\""] {
        assert!(nobody.contains(word), "{nobody}");
    }
}

#[test]
fn tensors_of_unread_kinds_matter_only_in_the_model() {
    let beside = loaded("unread_beside.pth");
    let kinds: Vec<&str> = beside.unread.values().map(String::as_str).collect();
    assert_eq!(kinds, ["sparse_tensor", "quantised", "ComplexFloatStorage"]);
    assert!(
        beside.to_string().contains("3 of kinds that are not read: graph (sparse_tensor)"),
        "{beside}"
    );
    refused(
        "complex_inside.pth",
        &["missing: layers.0.attn.q.bias", "layers.0.attn.q.bias (ComplexFloatStorage)"],
    );
    refused(
        "quantised_inside.pth",
        &["missing: neck.layer_norm1.weight", "neck.layer_norm1.weight (quantised)"],
    );
}

#[test]
fn what_cannot_be_read_is_named() {
    refused("integers.pth", &["I64", "expected f32"]);
    refused("expanded.pth", &["layers.0.attn.q.bias", "expanded view"]);
    refused("legacy.pth", &["before PyTorch 1.6", "torch.load"]);
    refused("compressed.pth", &["compressed", "torch.save stores"]);
}

#[test]
fn files_of_other_kinds_are_named_by_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sam.pth");
    let whole = std::fs::read(fixture("bare.pth")).unwrap();
    for (bytes, word) in [
        (
            &b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"[..],
            "git lfs pull",
        ),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"", "empty"),
        (&whole[..whole.len() / 2], "truncated"),
        (b"\x89HDF\r\n\x1a\n........", "HDF5"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = load(&mut Small::new(), &path, &Names::PLAIN).unwrap_err().to_string();
        assert!(error.contains("sam.pth") && error.contains(word), "{word}: {error}");
    }
}

#[test]
fn damaged_values_are_found_by_their_checksum() {
    let mut bytes = std::fs::read(fixture("bare.pth")).unwrap();
    let value = expected()["layers.0.attn.q.weight"][0].to_le_bytes();
    let second = expected()["layers.0.attn.q.weight"][1].to_le_bytes();
    let needle = [value, second].concat();
    let at = bytes.windows(8).position(|window| window == needle).unwrap();
    bytes[at] ^= 1;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bare.pth");
    std::fs::write(&path, bytes).unwrap();
    let error = load(&mut Small::new(), &path, &Names::PLAIN).unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn an_adapter_of_torch_save_loads() {
    let mut model = Small::new();
    load_adapter(&mut model, fixture("")).unwrap();
    let adapter = model.attn.adapters.get("default").unwrap();
    let a: Vec<f32> = adapter.a.flatten_all().unwrap().to_vec1().unwrap();
    let b: Vec<f32> = adapter.b.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(a, (0..8).map(|i| i as f32 / 8.0).collect::<Vec<_>>());
    assert_eq!(b, (0..4).map(|i| i as f32 / 4.0).collect::<Vec<_>>());
}

/// A model of a user's, which is nothing but candle's map of variables.
struct Vit(VarMap);

impl ModuleTree for Vit {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        for (name, var) in &*self.0.data().lock().unwrap() {
            f(&nn::join(path, name), Node::Parameter(var));
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        for (name, var) in &*self.0.data().lock().unwrap() {
            f(&nn::join(path, name), NodeMut::Parameter(&mut var.as_tensor().clone()))?;
        }
        Ok(())
    }
}

#[test]
fn a_varmap_loads_through_a_table_of_names() {
    const VIT: Names = Names {
        renamed: &[("blocks.#.norm1.*", "layers.#.layer_norm1.*"), ("blocks.#.*", "layers.#.*")],
        fused: &[Fused::QKV],
        ..Names::PLAIN
    };
    let tensor = |shape: &[usize], start: f32| {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| start + i as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let in_file = BTreeMap::from([
        ("encoder.blocks.0.attn.qkv.weight".to_string(), tensor(&[6, 2], 0.0)),
        ("encoder.blocks.0.norm1.weight".to_string(), tensor(&[2], 50.0)),
        ("head.weight".to_string(), tensor(&[3], 90.0)),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vit.safetensors");
    files::write_tensors(&path, &in_file).unwrap();
    let varmap = VarMap::new();
    for (name, shape) in [
        ("layers.0.attn.q.weight", &[2, 2][..]),
        ("layers.0.attn.k.weight", &[2, 2]),
        ("layers.0.attn.v.weight", &[2, 2]),
        ("layers.0.layer_norm1.weight", &[2]),
    ] {
        let var = Var::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        varmap.data().lock().unwrap().insert(name.to_string(), var);
    }
    let mut vit = Vit(varmap);
    let loaded = load(&mut vit, &path, &VIT).unwrap();
    assert_eq!((loaded.prefix.as_str(), loaded.tensors, loaded.passed_over), ("encoder.", 2, 1));
    let vars = vit.0.data().lock().unwrap();
    let k: Vec<f32> = vars["layers.0.attn.k.weight"].flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(k, [4.0, 5.0, 6.0, 7.0]);
    let norm: Vec<f32> = vars["layers.0.layer_norm1.weight"].to_vec1().unwrap();
    assert_eq!(norm, [50.0, 51.0]);
}

/// Opcodes and bytes that a pickle of torch.save has.
const PIECES: [&[u8]; 24] = [
    b"(",
    b")",
    b"]",
    b"}",
    b"t",
    b"u",
    b"s",
    b"e",
    b"R",
    b"b",
    b"Q",
    b"h\x01",
    b"q\x01",
    b"j\x02\0\0\0",
    b"K\x02",
    b"M\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"\x86",
    b"\x87",
    b"0",
    b"2",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
];

/// Damages the fixtures at random, mostly in their pickles: `TORCH_CASES` times. No input may panic, ask for memory
/// that its file does not have, or change the model and fail.
#[test]
fn damaged_files_are_errors_or_what_they_hold() {
    let cases = std::env::var("TORCH_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(3000u64);
    let seeds: Vec<Vec<u8>> = std::fs::read_dir(fixture(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "pth" || end == "bin"))
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.pth");
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below.max(1)
    };
    let zero = Small::new().values();
    let mut fitting = 0;
    for _ in 0..cases {
        let mut bytes = seeds[random(seeds.len())].clone();
        // The pickle is at the start; the list of entries at the end.
        let reach = if random(4) == 0 { bytes.len() } else { bytes.len().min(900) };
        for _ in 0..1 + random(6) {
            let at = random(reach.min(bytes.len()));
            let piece = PIECES[random(PIECES.len())];
            match random(5) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] ^= 1 << random(8),
                2 => (0..piece.len().min(bytes.len() - at)).for_each(|i| bytes[at + i] = piece[i]),
                3 => bytes.truncate(at.max(1)),
                _ => {
                    let from = random(bytes.len());
                    let length = random(24).min(bytes.len() - from.max(at));
                    bytes.copy_within(from..from + length, at);
                }
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let mut model = Small::new();
        match load(&mut model, &path, &Names::PLAIN) {
            Ok(_) => {
                fitting += 1;
                assert!(model.values().values().flatten().all(|v| v.is_finite()));
            }
            Err(error) => {
                assert!(error.to_string().contains("damaged.pth"), "{error}");
                assert_eq!(model.values(), zero);
            }
        }
    }
    assert!(0 < fitting && fitting < cases, "{fitting} of {cases} load");
}
