//! The names of tensors in files of SAM and of models made of it. Modules use Hugging Face's; files have these, or
//! their makers'.
//!
//! Source: `transformers/models/sam/convert_sam_to_hf.py`.

use crate::nn::checkpoint::{Fused, Names, Part};

/// Rows of an image encoder, whose paths in the file and in the tree are given, and further ones.
macro_rules! renamed {
    ($file:literal, $tree:literal, $($more:expr),* $(,)?) => {
        &[
            (concat!($file, ".patch_embed.proj.*"), concat!($tree, ".patch_embed.projection.*")),
            (concat!($file, ".blocks.#.norm1.*"), concat!($tree, ".layers.#.layer_norm1.*")),
            (concat!($file, ".blocks.#.norm2.*"), concat!($tree, ".layers.#.layer_norm2.*")),
            (concat!($file, ".blocks.#.*"), concat!($tree, ".layers.#.*")),
            (concat!($file, ".neck.0.*"), concat!($tree, ".neck.conv1.*")),
            (concat!($file, ".neck.1.*"), concat!($tree, ".neck.layer_norm1.*")),
            (concat!($file, ".neck.2.*"), concat!($tree, ".neck.conv2.*")),
            (concat!($file, ".neck.3.*"), concat!($tree, ".neck.layer_norm2.*")),
            (concat!($file, ".*"), concat!($tree, ".*")),
            $($more),*
        ]
    };
}

/// Files of SAM: Hugging Face's, the original's, SAMed's and micro-sam's.
///
/// [Example](crate::nn::checkpoint::Names)
pub const SAM: Names = Names {
    renamed: RENAMED,
    heads: &[
        "mask_decoder.output_hypernetworks_mlps.#",
        "mask_decoder.iou_prediction_head",
        "mask_decoder.hq_mask_mlp",
    ],
    parts: &[
        Part { path: "vision_encoder", first: "patch_embed." },
        Part { path: "prompt_encoder", first: "not_a_point_embed." },
        Part { path: "mask_decoder", first: "iou_token." },
    ],
    // SAMed and micro-sam wrap the layers that they adapt.
    wrapped: &[
        (".attn.qkv.qkv_proj.", ".attn.qkv."),
        (".attn.qkv.qkv.", ".attn.qkv."),
        (".mlp.mlp_layer.", ".mlp."),
        // The original's name of SAM-HQ's head.
        ("mask_decoder.hf_mlp.", "mask_decoder.hq_mask_mlp."),
    ],
    ignored: &[
        // Constants of the image processor.
        "pixel_mean",
        "pixel_std",
        // Counters of batch normalisation layers that PyTorch saves.
        "*num_batches_tracked",
        // Low-rank matrices that SAMed and micro-sam save among the model's.
        "*.w_a_linear_*.weight",
        "*.w_b_linear_*.weight",
        "*.linear_a_*.weight",
        "*.linear_b_*.weight",
    ],
    fused: &[Fused::QKV],
    relatives: RELATIVES,
    // The position features of image and prompts.
    tied: Some((SHARED_EMBEDDING, PROMPT_EMBEDDING)),
    ..Names::PLAIN
};

/// Files of DeepSeek-OCR and Unlimited-OCR, whose encoder is a SAM's and two convolutions. A SAM's encoder alone loads
/// from them too.
///
/// [Example](crate::nn::checkpoint::Names)
pub const DEEPSEEK_OCR: Names = Names {
    // Transformers' names.
    wrapped: &[("proj.conv1.", "net_2."), ("proj.conv2.", "net_3.")],
    ignored: &["vision_encoder.net_2.weight", "vision_encoder.net_3.weight"],
    ..SAM
};

/// Files of DeepSeek-VL's hybrid models, as transformers writes them. The high-resolution tower is read, the other
/// parts are not.
///
/// [Example](crate::nn::checkpoint::Names)
pub const DEEPSEEK_VL: Names = Names {
    ignored: &["vision_model.*", "aligner.*", "language_model.*", "lm_head.*"],
    fused: &[Fused::QKV],
    ..Names::PLAIN
};

/// Files of ViTDet, as transformers writes them.
///
/// [Example](crate::nn::checkpoint::Names)
pub const VITDET: Names = Names {
    renamed: &[
        ("encoder.layer.#.norm1.*", "encoder.layer.#.layer_norm1.*"),
        ("encoder.layer.#.norm2.*", "encoder.layer.#.layer_norm2.*"),
        ("encoder.layer.#.attention.*", "encoder.layer.#.attn.*"),
        ("encoder.layer.#.mlp.fc1.*", "encoder.layer.#.mlp.lin1.*"),
        ("encoder.layer.#.mlp.fc2.*", "encoder.layer.#.mlp.lin2.*"),
    ],
    fused: &[Fused::QKV],
    save_renamed: true,
    ..Names::PLAIN
};

/// Files of GOT-OCR 2.0, as transformers writes them. The encoder and the projector are read, the language model is
/// not.
///
/// [Example](crate::nn::checkpoint::Names)
pub const GOT_OCR2: Names =
    Names { ignored: &["language_model.*", "lm_head.*"], fused: &[Fused::QKV], ..Names::PLAIN };

/// Files of Cellpose 4, as `torch.save` writes them.
///
/// [Example](crate::nn::checkpoint::Names)
pub const CELLPOSE_SAM: Names = Names {
    renamed: renamed!["encoder", "encoder", ("*", "*")],
    // Diameters of cells in the training data, which nothing reads.
    ignored: &["diam_labels", "diam_mean"],
    fused: &[Fused::QKV],
    relatives: &[(
        "encoder.cls_token",
        "Cellpose's network on DINOv3, which this crate does not run",
    )],
    save_renamed: true,
    ..Names::PLAIN
};

/// Tensors that models made of SAM have beside SAM's.
const RELATIVES: &[(&str, &str)] = &[
    ("*mask_decoder.hf_token.*", "SAM-HQ; load it into a sam::SamHqModel"),
    ("*hq_token.*", "SAM-HQ; load it into a sam::SamHqModel"),
    ("*memory_attention.*", "SAM 2, which this crate does not run"),
    ("*image_encoder.trunk.*", "SAM 2, which this crate does not run"),
    ("*vision_encoder.backbone.*", "SAM 2, which this crate does not run"),
    ("*patch_embed.seq.*", "MobileSAM, which this crate does not run"),
    ("*prompt_generator.*", "SAM-Adapter, which this crate does not run"),
    ("*.Adapter.*", "SAM with adapter layers, which this crate does not run"),
    ("*.*_Adapter.*", "SAM with adapter layers, which this crate does not run"),
    ("*.adapter_layer.*", "SAM-Med2D's adapter layers, which this crate does not run"),
    ("*lora_*", "SAM with LoRA inside; load the adapter as one"),
];

const SHARED_EMBEDDING: &str = "shared_image_embedding.positional_embedding";
const PROMPT_EMBEDDING: &str = "prompt_encoder.shared_embedding.positional_embedding";

/// Original and Hugging Face name.
const RENAMED: &[(&str, &str)] = renamed![
    "image_encoder",
    "vision_encoder",
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
    // SAM-HQ's.
    ("mask_decoder.hf_token.*", "mask_decoder.hq_token.*"),
    ("mask_decoder.compress_vit_feat.0.*", "mask_decoder.compress_vit_conv1.*"),
    ("mask_decoder.compress_vit_feat.1.*", "mask_decoder.compress_vit_norm.*"),
    ("mask_decoder.compress_vit_feat.3.*", "mask_decoder.compress_vit_conv2.*"),
    ("mask_decoder.embedding_encoder.0.*", "mask_decoder.encoder_conv1.*"),
    ("mask_decoder.embedding_encoder.1.*", "mask_decoder.encoder_norm.*"),
    ("mask_decoder.embedding_encoder.3.*", "mask_decoder.encoder_conv2.*"),
    ("mask_decoder.embedding_maskfeature.0.*", "mask_decoder.mask_conv1.*"),
    ("mask_decoder.embedding_maskfeature.1.*", "mask_decoder.mask_norm.*"),
    ("mask_decoder.embedding_maskfeature.3.*", "mask_decoder.mask_conv2.*"),
    // Last, so that the other direction reads Hugging Face's second name of this tensor too.
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", PROMPT_EMBEDDING),
    ("*", "*"),
];
