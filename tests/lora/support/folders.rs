//! Adapter folders that tests make: copies of fixtures, some with changed tensors, and how folders are compared.

use super::bits;
use super::Tensors;
use candle_core::Device;
use candle_sam_lora::lora::{
    save_named_adapter, write_adapter, LoraConfig, CONFIG_FILE, TENSORS_FILE,
};
use candle_sam_lora::nn::ModuleTree;
use candle_sam_lora::{files, Result};
use std::path::Path;
use tempfile::TempDir;

/// A copy of a fixture, which may be changed: its files do not have the fixture's permissions.
pub fn copy_of(fixture: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [CONFIG_FILE, TENSORS_FILE] {
        std::fs::write(dir.path().join(file), std::fs::read(fixture.join(file)).unwrap()).unwrap();
    }
    dir
}

pub fn tensors_of(folder: &Path) -> Tensors {
    files::read_tensors(folder.join(TENSORS_FILE), &Device::Cpu).unwrap()
}

/// A copy of a fixture with changed tensors.
pub fn changed(fixture: &Path, change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = copy_of(fixture);
    let mut tensors = tensors_of(fixture);
    change(&mut tensors);
    files::write_tensors(dir.path().join(TENSORS_FILE), &tensors).unwrap();
    dir
}

/// A folder with this adapter.
pub fn written(config: &LoraConfig, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(config, tensors, dir.path()).unwrap();
    dir
}

/// Saving the adapter of this name writes both files of the fixture, byte for byte.
pub fn assert_saved(model: &dyn ModuleTree, name: &str, config: &LoraConfig, fixture: &Path) {
    let dir = tempfile::tempdir().unwrap();
    save_named_adapter(model, name, config, dir.path()).unwrap();
    assert_same(CONFIG_FILE, dir.path(), fixture);
    assert_same(TENSORS_FILE, dir.path(), fixture);
}

/// Both have the same names and bits.
pub fn assert_same_tensors(what: &str, got: &Tensors, expected: &Tensors) {
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (key, tensor) in got {
        assert_eq!(bits(tensor), bits(&expected[key]), "{what}: {key}");
    }
}

/// The configuration in a file of this text.
pub fn read_config(text: &[u8]) -> Result<LoraConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CONFIG_FILE);
    std::fs::write(&path, text).unwrap();
    LoraConfig::load(&path)
}

/// This file of both folders has the same bytes.
pub fn assert_same(file: &str, got: &Path, expected: &Path) {
    let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
    assert!(bytes(got) == bytes(expected), "{} differs: {file}", expected.display());
}
