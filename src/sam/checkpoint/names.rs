//! The two namings of SAM's tensors: Hugging Face's, which this crate's modules use, and that of the original
//! segment-anything.
//!
//! Most names differ by a word or two ([`RULES`]). In the MLP heads of the mask decoder the first and the last layer
//! have names of their own in Hugging Face, so which number the last one has follows from the other names of the
//! same checkpoint: that is why whole lists are translated.
//!
//! Source: `transformers/models/sam/convert_sam_to_hf.py`.

use std::collections::{HashMap, HashSet};

/// Original and Hugging Face name; `#` stands for a number, `*` at the end for any rest. The first match counts.
const RULES: [(&str, &str); 26] = [
    ("image_encoder.patch_embed.proj.*", "vision_encoder.patch_embed.projection.*"),
    ("image_encoder.blocks.#.norm1.*", "vision_encoder.layers.#.layer_norm1.*"),
    ("image_encoder.blocks.#.norm2.*", "vision_encoder.layers.#.layer_norm2.*"),
    ("image_encoder.blocks.#.*", "vision_encoder.layers.#.*"),
    ("image_encoder.neck.0.*", "vision_encoder.neck.conv1.*"),
    ("image_encoder.neck.1.*", "vision_encoder.neck.layer_norm1.*"),
    ("image_encoder.neck.2.*", "vision_encoder.neck.conv2.*"),
    ("image_encoder.neck.3.*", "vision_encoder.neck.layer_norm2.*"),
    ("image_encoder.*", "vision_encoder.*"),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", SHARED_EMBEDDING),
    ("prompt_encoder.point_embeddings.#.*", "prompt_encoder.point_embed.#.*"),
    ("prompt_encoder.mask_downscaling.0.*", "prompt_encoder.mask_embed.conv1.*"),
    ("prompt_encoder.mask_downscaling.1.*", "prompt_encoder.mask_embed.layer_norm1.*"),
    ("prompt_encoder.mask_downscaling.3.*", "prompt_encoder.mask_embed.conv2.*"),
    ("prompt_encoder.mask_downscaling.4.*", "prompt_encoder.mask_embed.layer_norm2.*"),
    ("prompt_encoder.mask_downscaling.6.*", "prompt_encoder.mask_embed.conv3.*"),
    (
        "mask_decoder.transformer.layers.#.norm1.*",
        "mask_decoder.transformer.layers.#.layer_norm1.*",
    ),
    (
        "mask_decoder.transformer.layers.#.norm2.*",
        "mask_decoder.transformer.layers.#.layer_norm2.*",
    ),
    (
        "mask_decoder.transformer.layers.#.norm3.*",
        "mask_decoder.transformer.layers.#.layer_norm3.*",
    ),
    (
        "mask_decoder.transformer.layers.#.norm4.*",
        "mask_decoder.transformer.layers.#.layer_norm4.*",
    ),
    (
        "mask_decoder.transformer.norm_final_attn.*",
        "mask_decoder.transformer.layer_norm_final_attn.*",
    ),
    ("mask_decoder.output_upscaling.0.*", "mask_decoder.upscale_conv1.*"),
    ("mask_decoder.output_upscaling.1.*", "mask_decoder.upscale_layer_norm.*"),
    ("mask_decoder.output_upscaling.3.*", "mask_decoder.upscale_conv2.*"),
    // Last, so that the other direction reads Hugging Face's second name of this tensor too.
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", PROMPT_EMBEDDING),
    ("*", "*"),
];

/// The random matrix of the position features, shared by image and prompts.
pub(super) const SHARED_EMBEDDING: &str = "shared_image_embedding.positional_embedding";
/// The same tensor under the name it has inside the prompt encoder.
pub(super) const PROMPT_EMBEDDING: &str = "prompt_encoder.shared_embedding.positional_embedding";

/// The paths of the MLPs whose layers are numbered differently.
const HEADS: [&str; 2] =
    ["mask_decoder.output_hypernetworks_mlps.#", "mask_decoder.iou_prediction_head"];

/// How tensors are named in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `vision_encoder.layers.0.attn.qkv.weight`, as Hugging Face's `SamModel`.
    HuggingFace,
    /// `image_encoder.blocks.0.attn.qkv.weight`, as the original segment-anything.
    Original,
}

/// Original names as Hugging Face names, in the same order. A name that is one already, or that neither naming
/// knows, stays as it is.
pub fn to_hugging_face(names: &[&str]) -> Vec<String> {
    let heads = Heads::of(names);
    let translate = |name: &&str| match head_layer(name) {
        Some((head, _, _)) if heads.named.contains(head) => name.to_string(),
        Some((head, layer, rest)) => match layer.parse::<usize>() {
            Ok(0) => format!("{head}.proj_in.{rest}"),
            Ok(n) if heads.last.get(head) == Some(&n) => format!("{head}.proj_out.{rest}"),
            Ok(n) => format!("{head}.layers.{}.{rest}", n - 1),
            Err(_) => name.to_string(),
        },
        None => RULES
            .iter()
            .find_map(|(original, hugging_face)| rewrite(name, original, hugging_face))
            .unwrap_or_else(|| name.to_string()),
    };
    names.iter().map(translate).collect()
}

/// Hugging Face names as original names, in the same order. A name that is one already, or that neither naming
/// knows, stays as it is.
pub fn to_original(names: &[&str]) -> Vec<String> {
    let heads = Heads::of(names);
    let translate = |name: &&str| match head_layer(name) {
        Some((head, _, _)) if !heads.named.contains(head) => name.to_string(),
        Some((head, layer, rest)) => {
            // The layers between the first and the last count from 0; `proj_in` comes before them.
            let number = match (layer, layer.parse::<usize>()) {
                ("proj_in", _) => 0,
                ("proj_out", _) => heads.last.get(head).map_or(1, |n| n + 2),
                (_, Ok(n)) => n + 1,
                (_, Err(_)) => return name.to_string(),
            };
            format!("{head}.layers.{number}.{rest}")
        }
        None => RULES
            .iter()
            .find_map(|(original, hugging_face)| rewrite(name, hugging_face, original))
            .unwrap_or_else(|| name.to_string()),
    };
    names.iter().map(translate).collect()
}

/// What a list of names says about the MLP heads in it.
#[derive(Default)]
struct Heads<'a> {
    /// The heads with a `proj_in`, which only Hugging Face's naming has.
    named: HashSet<&'a str>,
    /// The highest `layers` number of each head.
    last: HashMap<&'a str, usize>,
}

impl<'a> Heads<'a> {
    fn of(names: &[&'a str]) -> Self {
        let mut heads = Self::default();
        for (head, layer, _) in names.iter().filter_map(|name| head_layer(name)) {
            if layer == "proj_in" {
                heads.named.insert(head);
            } else if let Ok(number) = layer.parse::<usize>() {
                let highest = heads.last.entry(head).or_insert(number);
                *highest = number.max(*highest);
            }
        }
        heads
    }
}

/// Splits a name inside a head into the head's path, the layer (`proj_in`, `proj_out` or a number) and the rest.
fn head_layer(name: &str) -> Option<(&str, &str, &str)> {
    let (path, rest) = name.rsplit_once('.')?;
    let (path, layer) = path.rsplit_once('.')?;
    let head = match layer {
        "proj_in" | "proj_out" => path,
        // Numbers beyond any model's are left alone, so that counting up from one cannot overflow.
        _ if layer.parse::<u16>().is_ok() => path.strip_suffix(".layers")?,
        _ => return None,
    };
    HEADS.iter().any(|pattern| rewrite(head, pattern, "").is_some()).then_some((head, layer, rest))
}

/// `name` in the form `to`, if it has the form `from`.
fn rewrite(name: &str, from: &str, to: &str) -> Option<String> {
    let (from, rest) = match from.strip_suffix('*') {
        Some(from) => {
            let length = from.split('.').count() - 1;
            let split = match length {
                0 => 0,
                _ => name.match_indices('.').nth(length - 1)?.0 + 1,
            };
            (from, &name[split..])
        }
        None => (from, ""),
    };
    let name = &name[..name.len() - rest.len()];
    let mut number = "";
    for (part, pattern) in name.split('.').zip(from.split('.')) {
        match pattern {
            "#" if part.parse::<u32>().is_ok() => number = part,
            _ if part == pattern => {}
            _ => return None,
        }
    }
    (name.split('.').count() == from.split('.').count())
        .then(|| to.replace('#', number).replace('*', rest))
}
