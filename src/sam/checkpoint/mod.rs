//! Checkpoints in safetensors: read in either naming, whole or sharded, with q, k and v fused or split; written in
//! either naming with q, k and v fused, as other tools expect them.

mod load;
mod names;
mod save;
mod source;

pub use load::load;
pub(super) use load::shape_of;
pub use names::{to_hugging_face, to_original, Naming};
pub use save::{save, save_pretrained};

/// The three projections in the order of their rows in the fused `qkv`.
const SPLIT: [&str; 3] = ["q", "k", "v"];

/// The names of q, k and v for a fused name: `a.attn.qkv.weight` gives `a.attn.q.weight` and so on.
fn split_names(fused: &str) -> Option<[String; 3]> {
    let (path, leaf) = fused.rsplit_once('.')?;
    let path = path.strip_suffix(".attn.qkv")?;
    Some(SPLIT.map(|part| format!("{path}.attn.{part}.{leaf}")))
}

/// The fused name for that of q, k or v, and which third of the fused tensor it is.
fn fused_name(split: &str) -> Option<(String, usize)> {
    let (path, leaf) = split.rsplit_once('.')?;
    let (path, part) = path.rsplit_once(".attn.")?;
    let third = SPLIT.iter().position(|name| *name == part)?;
    Some((format!("{path}.attn.qkv.{leaf}"), third))
}

/// The name of the model's root: none for a whole SAM, else that of the part whose first tensors it has.
fn root(model: &dyn crate::nn::ModuleTree) -> &'static str {
    const PARTS: [(&str, &str); 3] = [
        ("patch_embed.", "vision_encoder"),
        ("not_a_point_embed.", "prompt_encoder"),
        ("iou_token.", "mask_decoder"),
    ];
    let mut root = "";
    model.visit("", &mut |name, _| {
        let part = PARTS.iter().find(|(first, _)| name.starts_with(first));
        root = part.map_or(root, |(_, part)| part);
    });
    root
}
