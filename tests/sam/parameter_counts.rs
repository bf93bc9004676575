//! The trainable-parameter line of SAM ViT-B with LoRA r=16, from the real model. It is what PEFT prints for every
//! variant. The two lines of the guide are DoRA's (docs/parameter-counts.md).

use crate::common::model;
use candle_sam_lora::lora::{count_parameters, inject, BiasTraining, LoraConfig, ParameterCount};
use candle_sam_lora::sam::{AttentionKind, SamConfig};
use candle_sam_lora::Result;

fn report(config: &LoraConfig) -> Result<ParameterCount> {
    let mut model = model::zeros(&SamConfig::vit_b(), AttentionKind::Split)?;
    inject(&mut model, config, 0)?;
    Ok(count_parameters(&model))
}

fn lora(targets: &str) -> LoraConfig {
    LoraConfig::new(16).alpha(32.0).dropout(0.1).target_modules(targets.split(','))
}

#[test]
fn the_lines_of_the_guide_are_those_of_dora() -> Result<()> {
    assert_eq!(
        report(&lora("q,v").dora())?.to_string(),
        "trainable params: 608,256 || all params: 94,343,728 || trainable%: 0.6447"
    );
    assert_eq!(
        report(&lora("q,k,v").dora())?.to_string(),
        "trainable params: 912,384 || all params: 94,647,856 || trainable%: 0.9640"
    );
    // The code shown in the guide gives these counts.
    assert_eq!(
        report(&lora("q,v"))?.to_string(),
        "trainable params: 589,824 || all params: 94,325,296 || trainable%: 0.6253"
    );
    Ok(())
}

/// A variant's name in the counts, and what makes a plain configuration one.
type Variant = (&'static str, fn(LoraConfig) -> LoraConfig);

#[test]
fn every_variant_counts_as_in_peft() -> Result<()> {
    let text = candle_sam_lora::files::read_text(model::fixtures().join("counts.json"))?;
    let counts: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let variants: [Variant; 5] = [
        ("lora", |config| config),
        ("rslora", LoraConfig::rslora),
        ("dora", LoraConfig::dora),
        ("lora_bias", LoraConfig::lora_bias),
        ("bias_lora_only", |config| config.bias(BiasTraining::LoraOnly)),
    ];
    for (variant, change) in variants {
        for targets in ["q,v", "q,k,v"] {
            let report = report(&change(lora(targets)))?;
            let expected = &counts[variant][targets];
            let expected = ["trainable", "all_without_positional_embedding"]
                .map(|key| expected[key].as_u64().expect("a count"));
            let got = [report.trainable as u64, report.all as u64];
            assert_eq!(got, expected, "{variant} on {targets}");
        }
    }
    Ok(())
}
