//! Prints the Rust declarations of a C header: `bindings kernels/abi.h > src/launch/bindings.rs`. Behind them stands,
//! for each struct, where its addresses and dropout masks lie: its slots, which a launch fills.

use std::collections::HashMap;

#[derive(Debug)]
struct PlainOldData;

impl bindgen::callbacks::ParseCallbacks for PlainOldData {
    /// Rust may look at the bytes of a params struct: there is no padding, which this derive checks.
    fn add_derives(&self, _: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
        vec!["bytemuck::Pod".to_string(), "bytemuck::Zeroable".to_string()]
    }
}

/// A type's size, and the offsets of its addresses and of its masks.
#[derive(Clone, Default)]
struct Layout {
    bytes: usize,
    slots: [Vec<usize>; 2],
}

/// The layouts of types that are no structs with slots in them.
fn leaves() -> HashMap<String, Layout> {
    let leaf = |bytes, [address, mask]: [&[usize]; 2]| Layout {
        bytes,
        slots: [address.to_vec(), mask.to_vec()],
    };
    let numbers = [("u32", 4), ("f32", 4), ("u64", 8)].map(|(name, n)| (name, leaf(n, [&[]; 2])));
    let slots = [("device_ptr", leaf(8, [&[0], &[]])), ("DropoutMask", leaf(20, [&[], &[0]]))];
    numbers.into_iter().chain(slots).map(|(name, layout)| (name.to_string(), layout)).collect()
}

/// Trait and types of the implementations.
const PARAMS: &str = "
/// Where what a launch fills stands in a params struct: the offsets of its addresses, and of its dropout masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    pub addresses: &'static [usize],
    pub masks: &'static [usize],
}

/// A kernel's params struct.
pub trait Params: bytemuck::NoUninit {
    const SLOTS: Slots;
}
";

/// The implementations of `Params`, from the text of the declarations. No struct has padding, so sizes add up to
/// offsets.
fn slots(declarations: &str) -> Result<String, String> {
    let mut known = leaves();
    let mut text = String::new();
    let mut lines = declarations.lines().map(str::trim);
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("pub struct ").and_then(|l| l.strip_suffix(" {")) else {
            continue;
        };
        let mut layout = Layout::default();
        for field in lines.by_ref().take_while(|line| *line != "}") {
            let (_, kind) = field.trim_end_matches(',').split_once(": ").ok_or(field)?;
            let array = kind.strip_prefix('[').and_then(|k| k.strip_suffix("usize]"));
            let (kind, count) = array.and_then(|a| a.split_once("; ")).unwrap_or((kind, "1"));
            let element = known.get(kind).ok_or_else(|| format!("{name}: what is {kind}?"))?;
            for _ in 0..count.parse::<usize>().map_err(|e| format!("{field}: {e}"))? {
                for (all, of_element) in layout.slots.iter_mut().zip(&element.slots) {
                    all.extend(of_element.iter().map(|offset| layout.bytes + offset));
                }
                layout.bytes += element.bytes;
            }
        }
        if name.ends_with("Params") {
            let [addresses, masks] = &layout.slots;
            text += &format!(
                "impl Params for {name} {{ const SLOTS: Slots = \
                 Slots {{ addresses: &{addresses:?}, masks: &{masks:?} }}; }}\n"
            );
        }
        known.entry(name.to_string()).or_insert(layout);
    }
    Ok(text)
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
        .generate()?
        .to_string();
    let slots = slots(&bindings)?;
    print!("// Made from kernels/abi.h by scripts/bindings.sh; not edited by hand.\n\n{bindings}{PARAMS}\n{slots}");
    Ok(())
}
