//! Prints the Rust declarations of a C header: `bindings kernels/abi.h > src/launch/bindings.rs`.

#[derive(Debug)]
struct PlainOldData;

impl bindgen::callbacks::ParseCallbacks for PlainOldData {
    /// Rust may look at the bytes of a params struct: there is no padding, which this derive checks.
    fn add_derives(&self, _: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
        vec!["bytemuck::Pod".to_string(), "bytemuck::Zeroable".to_string()]
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let header = std::env::args().nth(1).ok_or("usage: bindings HEADER")?;
    let bindings = bindgen::Builder::default()
        .header(&header)
        .allowlist_file(".*abi\\.h")
        .derive_default(true)
        .layout_tests(true)
        .disable_header_comment()
        .parse_callbacks(Box::new(PlainOldData))
        .generate()?;
    print!("// Made from kernels/abi.h by scripts/bindings.sh; not edited by hand.\n\n{bindings}");
    Ok(())
}
