//! The names of SAM's tensors in files, and of DeepSeek-OCR's: those of Hugging Face, which this crate's modules use, and
//! those of the original segment-anything.
//!
//! Source: `transformers/models/sam/convert_sam_to_hf.py`.

use crate::nn::checkpoint::{Fused, Names, Part};

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

/// Files of DeepSeek-OCR, whose encoder is a SAM's and two convolutions. A SAM's encoder alone loads from them too.
///
/// [Example](crate::nn::checkpoint::Names)
pub const DEEPSEEK_OCR: Names =
    Names { ignored: &["vision_encoder.net_2.weight", "vision_encoder.net_3.weight"], ..SAM };

/// Files of GOT-OCR 2.0, as transformers writes them. The encoder and the projector are read, the language model is not.
///
/// [Example](crate::nn::checkpoint::Names)
pub const GOT_OCR2: Names =
    Names { ignored: &["language_model.*", "lm_head.*"], fused: &[Fused::QKV], ..Names::PLAIN };

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
const RENAMED: &[(&str, &str)] = &[
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
