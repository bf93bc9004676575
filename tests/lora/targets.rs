//! Which layers a configuration adapts, against PEFT's own choice: names, indices, patterns, and what it refuses.

use crate::support::blocks::{fixture, Net};
use crate::support::folders::read_config;
use crate::support::{adapted, snapshot};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::Result;
use serde_json::{json, Value};

fn config(options: &Value) -> Result<LoraConfig> {
    let mut file = options.clone();
    file["peft_type"] = json!("LORA");
    file["r"] = json!(2);
    read_config(file.to_string().as_bytes())
}

#[test]
fn the_same_layers_as_in_peft_are_adapted() {
    let cases = std::fs::read_to_string(fixture("targets.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    let (mut adapting, mut refused) = (0, 0);
    for case in &cases {
        let mut model = Net::base();
        let result = config(&case["config"]).and_then(|config| inject(&mut model, &config, 0));
        if let Some(expected) = case["adapted"].as_array() {
            let expected: Vec<&str> = expected.iter().filter_map(Value::as_str).collect();
            assert!(result.is_ok(), "{}: {}", case["config"], result.unwrap_err());
            assert_eq!(adapted(&model), expected, "{}", case["config"]);
            adapting += 1;
        } else {
            let error = result.expect_err(&case["config"].to_string()).to_string();
            assert_eq!(snapshot(&model), snapshot(&Net::base()), "{}", case["config"]);
            // Our message has the names that PEFT's has.
            let theirs = case["error"].as_str().unwrap();
            for word in ["layers_to_transform", "layers_pattern"] {
                assert!(!theirs.contains(word) || error.contains(word), "{error}\n{theirs}");
            }
            refused += 1;
        }
    }
    assert_eq!((adapting, refused), (15, 10));
}

#[test]
fn indices_and_patterns_are_read_and_written_as_they_were() {
    for (indices, pattern) in [
        (json!(1), json!("layers")),
        (json!([0, 2]), json!(["blocks", "layers"])),
        (json!([]), json!(null)),
        (json!(null), json!(null)),
    ] {
        let options = json!({
            "target_modules": ["q"], "layers_to_transform": indices, "layers_pattern": pattern
        });
        let written: Value =
            serde_json::from_str(&config(&options).unwrap().to_json().unwrap()).unwrap();
        assert_eq!(written["layers_to_transform"], indices);
        assert_eq!(written["layers_pattern"], pattern);
    }
    let built = LoraConfig::new(2)
        .target_modules(["v"])
        .layers_to_transform([0, 1])
        .layers_pattern(["layers"]);
    let mut model = Net::base();
    inject(&mut model, &built, 0).unwrap();
    assert_eq!(adapted(&model), ["encoder.layers.0.v", "encoder.layers.1.v"]);
}
