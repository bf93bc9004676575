//! Weighted sums of adapters against PEFT's `add_weighted_adapter`: all its kinds, the random ones with our masks in
//! PEFT's place.

use crate::support::blocks::{below, facts, input, loaded, read, Net, F32_BOUND, NAMES};
use crate::support::{bits, relative_error, snapshot};
use candle_sam_lora::lora::{
    active_adapters, add_weighted_adapter, load_named_adapter, save_named_adapter, set_adapter,
    Combination, MajoritySign, TaskArithmetic,
};
use candle_sam_lora::nn::{trainable_variables, Mode, ModuleTree, Node};

/// The sum of a case in the fixture.
fn combination(facts: &serde_json::Value) -> Combination {
    let density = || facts["density"].as_f64().unwrap();
    let seed = || facts["seed"].as_u64().unwrap();
    let rank = facts.get("svd_rank").map(|rank| rank.as_u64().unwrap() as usize);
    let name = facts["combination_type"].as_str().unwrap();
    let (arithmetic, is_svd) = match (name.strip_suffix("svd"), name) {
        (_, "cat") => return Combination::Cat,
        (Some(arithmetic), _) => (arithmetic.trim_end_matches('_'), true),
        (None, arithmetic) => (arithmetic, false),
    };
    let mut arithmetic = match arithmetic {
        "linear" | "" => TaskArithmetic::SUM,
        "ties" => TaskArithmetic::ties(density()),
        "dare_linear" => TaskArithmetic::dare_linear(density(), seed()),
        "dare_ties" => TaskArithmetic::dare_ties(density(), seed()),
        "magnitude_prune" => TaskArithmetic::magnitude_prune(density()),
        other => panic!("{other}"),
    };
    if facts.get("majority_sign_method").is_some_and(|method| method == "frequency") {
        arithmetic.sign = Some(MajoritySign::Frequency);
    }
    match is_svd {
        true => Combination::Svd { arithmetic, rank },
        false => Combination::Factors(arithmetic),
    }
}

const WEIGHTED: [&str; 16] = [
    "linear",
    "linear_one",
    "cat",
    "svd",
    "svd_rank",
    "ties",
    "ties_frequency",
    "ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "conv_svd",
    "conv_cat",
];

#[test]
fn weighted_adapters_are_pefts() {
    let io = read("several.safetensors");
    let mut compared = 0;
    for case in WEIGHTED {
        let facts = facts("several.safetensors", &format!("weighted/{case}"));
        let names: Vec<&str> =
            facts["adapters"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        let weights = facts["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap());
        let parts: Vec<(&str, f64)> = names.iter().copied().zip(weights).collect();
        let mut model = loaded(&NAMES);
        let combination = combination(&facts);
        let config = add_weighted_adapter(&mut model, "sum", &parts, combination).unwrap();
        assert_eq!(active_adapters(&model), ["a"], "the new one waits");
        set_adapter(&mut model, &["sum"]).unwrap();
        let error = relative_error(
            &model.forward(&input(), Mode::Eval).unwrap(),
            &io[&format!("weighted/{case}/out")],
        );
        assert!(error < F32_BOUND, "{case}: {error}");
        let deltas = below(&io, &format!("weighted/{case}/delta/"));
        assert_eq!(trainable_variables(&model).unwrap().len(), 2 * deltas.len());
        model.visit("", &mut |path, node| {
            let Node::Layer(layer) = node else { return };
            let Some(sum) = layer.adapters.get("sum") else { return };
            assert_eq!(sum.rank() as u64, facts["r"].as_u64().unwrap(), "{case}: {path}");
            let error = relative_error(&sum.delta().unwrap(), &deltas[path]);
            assert!(error < F32_BOUND, "{case}: {path}: {error}");
            compared += 1;
        });
        // It is an adapter as any other: saved, and loaded into a model that never had the others.
        let dir = tempfile::tempdir().unwrap();
        save_named_adapter(&model, "sum", &config, dir.path()).unwrap();
        let mut alone = Net::base();
        load_named_adapter(&mut alone, "default", dir.path()).unwrap();
        let [got, expected] = [&alone, &model].map(|m| m.forward(&input(), Mode::Eval).unwrap());
        assert_eq!(bits(&got), bits(&expected), "{case}");
    }
    assert_eq!(compared, 14 * 6 + 2 * 6);
}

#[test]
fn a_sum_that_cannot_be_is_refused_and_changes_nothing() {
    let mut model = loaded(&NAMES);
    let before = snapshot(&model);
    let linear = Combination::LINEAR;
    let ties = |density| Combination::Factors(TaskArithmetic::ties(density));
    let dare = |density| Combination::Factors(TaskArithmetic::dare_linear(density, 0));
    let cases = [
        ("sum", vec![], linear, "at least"),
        ("sum", vec![("x", 1.0)], linear, "no adapter called"),
        ("sum", vec![("a", f64::NAN)], linear, "finite"),
        ("sum", vec![("a", 1.0), ("d", 1.0)], linear, "one rank"),
        ("sum", vec![("a", 1.0), ("c", 1.0)], Combination::Cat, "DoRA"),
        ("sum", vec![("a", 1.0), ("b", 1.0)], Combination::Cat, "lora_bias"),
        ("sum", vec![("a", 1.0), ("d", 1.0)], Combination::svd(Some(0)), "rank"),
        ("sum", vec![("a", 1.0), ("e", 1.0)], ties(0.0), "density"),
        ("sum", vec![("a", 1.0), ("e", 1.0)], ties(f64::NAN), "density"),
        ("sum", vec![("a", 1.0), ("e", 1.0)], dare(1.5), "density"),
        ("sum", vec![("a", 1.0), ("e", 1.0)], dare(1e-9), "density"),
        ("a", vec![("a", 1.0)], linear, "already carries"),
        ("x.y", vec![("a", 1.0)], linear, "name"),
    ];
    for (name, parts, combination, expected) in cases {
        let error = add_weighted_adapter(&mut model, name, &parts, combination).unwrap_err();
        assert!(error.to_string().contains(expected), "{parts:?}: {error}");
        assert_eq!(snapshot(&model), before);
    }
}
