//! `adapter_config.json`: PEFT's own files come back byte for byte; what is wrong or unsupported is refused by name.

use crate::common::property;
use crate::support::folders::read_config;
use crate::support::linears::{fixture, KINDS};
use candle_sam_lora::lora::{BiasTraining, InitLoraWeights, LoraConfig, ModuleNames, CONFIG_FILE};
use proptest::prelude::*;
use serde_json::{json, Value};

fn read_json(value: &Value) -> candle_sam_lora::Result<LoraConfig> {
    read_config(value.to_string().as_bytes())
}

fn minimal() -> Value {
    json!({"peft_type": "LORA", "target_modules": ["q"]})
}

#[test]
fn peft_files_come_back_byte_for_byte() {
    for kind in KINDS {
        let path = fixture(kind).join(CONFIG_FILE);
        let config = LoraConfig::load(&path).unwrap();
        assert_eq!(config.to_json().unwrap(), std::fs::read_to_string(&path).unwrap(), "{kind}");
    }
}

#[test]
fn fields_have_their_meaning() {
    let config = LoraConfig::load(fixture("pattern").join(CONFIG_FILE)).unwrap();
    assert_eq!((config.rank, config.alpha, config.dropout), (4, 32.0, 0.1));
    assert_eq!(config.rank_pattern["mlp.lin1"], 3);
    assert_eq!(config.alpha_pattern["lin1"], 7.5);
    assert_eq!(config.other["peft_version"], "0.21.2");
    let config = LoraConfig::load(fixture("regex").join(CONFIG_FILE)).unwrap();
    let regex = ModuleNames::Regex(r"(q|mlp\.lin\d)".to_string());
    assert_eq!(config.target_modules, Some(regex));
    let config = LoraConfig::load(fixture("bias_lora_only").join(CONFIG_FILE)).unwrap();
    assert_eq!(config.bias, BiasTraining::LoraOnly);
}

#[test]
fn absent_fields_are_peft_defaults_and_unknown_ones_are_kept() {
    let mut file = minimal();
    file["of_the_future"] = json!({"b": [1, {"d": 0.5, "c": null}], "a": "x"});
    file["inference_mode"] = json!(false);
    let config = read_json(&file).unwrap();
    let mut defaults = LoraConfig::new(8).target_modules(["q"]);
    defaults.other = config.other.clone();
    assert_eq!(config, defaults);
    assert_eq!((config.rank, config.alpha, config.dropout), (8, 8.0, 0.0));
    let written: Value = serde_json::from_str(&config.to_json().unwrap()).unwrap();
    assert_eq!(written["of_the_future"], file["of_the_future"]);
    assert_eq!(written["inference_mode"], json!(true));
}

#[test]
fn unknown_keys_with_values_are_told() {
    let mut file = minimal();
    for (key, value) in [
        ("use_superlora", json!(true)),
        ("scale_mode", json!({"per": "channel"})),
        // Neutral, or without effect by themselves.
        ("use_other", json!(false)),
        ("other_config", json!({})),
        ("peft_version", json!("9.0")),
        ("loftq_config", json!({"loftq_bits": 4})),
    ] {
        file[key] = value;
    }
    let warnings = read_json(&file).unwrap().warnings();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].starts_with("use_superlora is true"), "{warnings:?}");
    assert!(warnings[1].starts_with(r#"scale_mode is {"per":"channel"}"#), "{warnings:?}");
    for kind in KINDS {
        let config = LoraConfig::load(fixture(kind).join(CONFIG_FILE)).unwrap();
        assert!(config.warnings().is_empty(), "{kind}: {:?}", config.warnings());
    }
}

/// PEFT 0.21.2 with a SAM, for `get_peft_model` and `PeftModel.from_pretrained` alike.
#[test]
fn task_types_that_peft_refuses_are_told() {
    for (task_type, refused) in [
        ("SEQ_CLS", false),
        ("TOKEN_CLS", false),
        ("QUESTION_ANS", false),
        ("FEATURE_EXTRACTION", false),
        ("SEQ_2_SEQ_LM", true),
        ("CAUSAL_LM", true),
        ("mask-generation", true),
        ("causal_lm", true),
        ("", true),
    ] {
        let mut config = LoraConfig::new(2).target_modules(["q"]);
        config.task_type = Some(task_type.to_string());
        let expected = format!("task_type is {task_type:?}: PEFT");
        let told = |config: &LoraConfig| config.warnings().iter().any(|w| w.starts_with(&expected));
        assert_eq!(told(&config), refused, "{task_type}");
        let read = read_config(config.to_json().unwrap().as_bytes()).unwrap();
        assert_eq!(told(&read), refused, "{task_type}");
    }
}

#[test]
fn alpha_is_written_as_python_would() {
    for (alpha, text) in [(32.0, "\"lora_alpha\": 32,"), (7.5, "\"lora_alpha\": 7.5,")] {
        let json = LoraConfig::new(4).alpha(alpha).target_modules(["q"]).to_json().unwrap();
        assert!(json.contains(text), "{json}");
    }
}

#[test]
fn scaling_is_alpha_over_rank_or_its_root() {
    assert_eq!(LoraConfig::new(16).scaling(16, 32.0), 2.0);
    assert_eq!(LoraConfig::new(16).rslora().scaling(16, 32.0), 8.0);
}

#[test]
fn a_built_configuration_reads_back() {
    let config = LoraConfig::new(16)
        .alpha(32.0)
        .dropout(0.1)
        .target_regex(r".*\.(q|v)")
        .exclude_modules(["layers.0.attn.q"])
        .modules_to_save(["neck"])
        .bias(BiasTraining::All)
        .rslora()
        .lora_bias()
        .rank_of("attn.q", 4)
        .alpha_of("attn.q", 0.5);
    let mut read = read_config(config.to_json().unwrap().as_bytes()).unwrap();
    assert_eq!(read.other.remove("inference_mode"), Some(json!(true)));
    assert_eq!(read, config);
}

#[test]
fn wrong_and_unsupported_values_are_refused_by_name() {
    let cases = [
        ("peft_type", json!("IA3"), "peft_type"),
        ("r", json!(0), "the rank r must be"),
        ("r", json!(1_000_000_000_000_u64), "the rank r must be"),
        ("r", json!(-4), "invalid value"),
        ("r", json!(4.5), "invalid type"),
        ("rank_pattern", json!({"q": 0}), "the rank q"),
        ("lora_alpha", json!("x"), "invalid type"),
        ("lora_dropout", json!(1.0), "lora_dropout"),
        ("lora_dropout", json!(-0.1), "lora_dropout"),
        ("target_modules", json!([]), "target_modules"),
        ("target_modules", json!(""), "target_modules"),
        ("target_modules", json!(null), "target_modules"),
        ("target_modules", json!(3), "not a LoRA configuration"),
        ("modules_to_save", json!([""]), "modules_to_save"),
        ("bias", json!("some"), "unknown variant"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out"),
        ("init_lora_weights", json!("pissa_niter_x"), "init_lora_weights"),
        ("init_lora_weights", json!("corda"), "init_lora_weights"),
        ("init_lora_weights", json!("mica"), "init_lora_weights"),
        ("layers_to_transform", json!(0.5), "not a LoRA configuration"),
        ("layers_pattern", json!("layers"), "layers_pattern needs layers_to_transform"),
        ("layers_pattern", json!(["layers"]), "layers_pattern needs layers_to_transform"),
        ("layer_replication", json!([[0, 4]]), "layer_replication"),
        ("target_parameters", json!(["w"]), "target_parameters"),
        ("trainable_token_indices", json!([1]), "trainable_token_indices"),
        ("use_qalora", json!(true), "use_qalora"),
        ("alora_invocation_tokens", json!([1]), "alora_invocation_tokens"),
        ("velora_config", json!({"scale": 1}), "velora_config"),
        ("kasa_config", json!({"beta": 1}), "kasa_config"),
        ("use_bdlora", json!({"n": 2}), "use_bdlora"),
        ("ensure_weight_tying", json!(true), "ensure_weight_tying"),
    ];
    for (key, value, expected) in cases {
        let mut file = minimal();
        file[key] = value.clone();
        let error = read_json(&file).unwrap_err().to_string();
        assert!(error.contains(expected), "{key} = {value}: {error}");
        assert!(error.contains(CONFIG_FILE), "{error}");
    }
    let mut both = minimal();
    both["use_dora"] = json!(true);
    both["lora_bias"] = json!(true);
    assert!(read_json(&both).unwrap_err().to_string().contains("use_dora"));
    assert!(read_json(&json!({"target_modules": ["q"]}))
        .unwrap_err()
        .to_string()
        .contains("peft_type"));
}

#[test]
fn numbers_that_are_none_are_refused() {
    let config = || LoraConfig::new(4).target_modules(["q"]);
    assert!(config().validate().is_ok());
    for alpha in [f64::NAN, f64::INFINITY, 1e39] {
        assert!(config().alpha(alpha).validate().is_err());
        assert!(config().alpha_of("q", alpha).validate().is_err());
    }
    let mut endless = config();
    endless.init_lora_weights = InitLoraWeights::Named("pissa_niter_99999999".into());
    let message = endless.validate().unwrap_err().to_string();
    assert!(message.contains("fewer than 1000 iterations"), "{message}");
    for dropout in [f64::NAN, 1.0, 0.999_999_9, -1e-9] {
        assert!(config().dropout(dropout).validate().is_err());
    }
    assert!(
        read_config(br#"{"peft_type":"LORA","target_modules":["q"],"lora_alpha":NaN}"#).is_err()
    );
    assert!(
        read_config(br#"{"peft_type":"LORA","target_modules":["q"],"lora_alpha":1e999}"#).is_err()
    );
}

#[test]
fn hostile_text_is_an_error() {
    let deep = "[".repeat(100_000);
    for text in ["", "{", "[]", "null", "\u{0}", "{\"peft_type\":\"LORA\"", deep.as_str()] {
        assert!(read_config(text.as_bytes()).is_err());
    }
    assert!(read_config(&[0xFF, 0xFE, b'{']).is_err());
    assert!(LoraConfig::load(fixture("absent").join(CONFIG_FILE)).is_err());
}

proptest! {
    #![proptest_config(property::config(256))]

    #[test]
    fn mutated_files_never_panic(kind in 0..KINDS.len(), cut in 0..1200usize, edits in prop::collection::vec((0..1200usize, any::<u8>()), 0..4)) {
        let mut bytes = std::fs::read(fixture(KINDS[kind]).join(CONFIG_FILE)).unwrap();
        for (position, byte) in edits {
            let position = position % bytes.len();
            bytes[position] = byte;
        }
        if cut % 3 == 0 {
            bytes.truncate(cut);
        }
        if let Ok(config) = read_config(&bytes) {
            let again = read_config(config.to_json().unwrap().as_bytes()).unwrap();
            prop_assert_eq!(again.to_json().unwrap(), config.to_json().unwrap());
        }
    }
}

#[test]
fn what_stands_in_the_place_of_the_file_is_named() {
    let text = minimal().to_string();
    let config = read_config(format!("\u{feff}{text}").as_bytes()).expect("a byte order mark");
    assert_eq!(config.target_modules, Some(ModuleNames::List(vec!["q".into()])));
    for (text, expected) in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        ("<!DOCTYPE html><html>", "an HTML page"),
        ("", "0 bytes"),
        (r#"{"peft_type": "LORA", "target_modules": {"a": 1}}"#, "a list of names of modules"),
        (r#"{"peft_type": "LORA", "init_lora_weights": 1}"#, "true, false or the name"),
    ] {
        let error = read_config(text.as_bytes()).expect_err(expected).to_string();
        assert!(error.contains(expected) && error.contains(CONFIG_FILE), "{error}");
    }
}
