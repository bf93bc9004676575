//! Modules that PEFT trains and saves whole, on SAM: whose position features an adapter changes, what its files hold
//! besides, and which modules are refused. The values are compared with PEFT's in `sam_adapters`.

use crate::common::adapters::{adapted, folder, read, run};
use crate::common::model::{self, Tensors};
use crate::support::folders::{assert_same, assert_same_tensors, changed, tensors_of, written};
use crate::support::{bits, snapshot};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora::{
    count_parameters, count_parameters_as_peft, inject, load_adapter, load_adapter_tensors,
    merge_and_unload, named_adapter_state, read_adapter, save_adapter, unload, BiasTraining,
    LoraConfig, CONFIG_FILE, TENSORS_FILE,
};
use candle_sam_lora::nn::{
    named_parameters, set_trainable, trainable_variables, without_gradients, Mode,
};
use candle_sam_lora::sam::checkpoint::{self, Naming};
use candle_sam_lora::sam::{AttentionKind, SamModel};
use candle_sam_lora::{files, Error};

const KINDS: [&str; 3] = ["save_prompt_encoder", "save_composite_bias_all", "save_both_embeddings"];
const IMAGE: &str = "base_model.model.shared_image_embedding.positional_embedding";
const PROMPTS: &str = "base_model.model.prompt_encoder.shared_embedding.positional_embedding";
const BIAS: &str = "base_model.model.vision_encoder.neck.modules_to_save.default.layer_norm1.bias";

fn base() -> Result<SamModel> {
    model::model("tiny", AttentionKind::Split, DType::F32)
}

fn config() -> LoraConfig {
    LoraConfig::new(2).target_modules(["q", "v"])
}

fn masks(model: &SamModel) -> Result<Vec<u32>> {
    let inputs = read(folder("inputs.safetensors"), &Device::Cpu)?;
    // With gradients the decoder sums in another order.
    Ok(bits(&run(&without_gradients(model)?, &inputs, Mode::Eval)?["pred_masks"]))
}

/// The position features of the image, and those of the prompts where they have their own.
fn features(model: &SamModel) -> (Vec<u32>, Option<Vec<u32>>) {
    let own = model.prompt_encoder.shared_embedding.own.as_ref();
    (bits(&model.shared_image_embedding.positional_embedding.0), own.map(|own| bits(&own.0)))
}

#[test]
fn files_come_back_bit_for_bit() -> Result<()> {
    for kind in KINDS {
        let mut model = base()?;
        let config = load_adapter(&mut model, folder(kind))?;
        let written = tempfile::tempdir()?;
        save_adapter(&model, &config, written.path())?;
        assert_same(CONFIG_FILE, written.path(), &folder(kind));
        let (got, mut expected) = (tensors_of(written.path()), tensors_of(&folder(kind)));
        let all = expected.len();
        expected
            .retain(|key, _| !key.contains("original_module") && !key.contains("modules_to_save"));
        match kind {
            // Twice the biases of the neck (2), the head (3) and the norm (1).
            "save_composite_bias_all" => assert_eq!(all - expected.len(), 12),
            _ => assert_same(TENSORS_FILE, written.path(), &folder(kind)),
        }
        assert_same_tensors(kind, &got, &expected);
    }
    Ok(())
}

#[test]
fn the_saved_features_change_and_the_others_stay() -> Result<()> {
    let before = features(&base()?).0;
    for (kind, image, prompts) in [
        ("save_prompt_encoder", false, true),
        ("save_composite_bias_all", true, false),
        ("save_both_embeddings", true, true),
    ] {
        let model = adapted(kind, &Device::Cpu)?;
        let saved = files::read_tensors(folder(kind).join(TENSORS_FILE), &Device::Cpu)?;
        let expected = |key: &str, saved_here: bool| {
            assert_eq!(saved.contains_key(key), saved_here, "{kind}: {key}");
            saved.get(key).map_or(before.clone(), bits)
        };
        let expected = (expected(IMAGE, image), Some(expected(PROMPTS, prompts)));
        assert_eq!(features(&model), expected, "{kind}");
        let trained: Tensors = named_parameters(&model).into_iter().collect();
        assert_eq!(trained.contains_key(&IMAGE["base_model.model.".len()..]), image, "{kind}");
        assert_eq!(trained.contains_key(&PROMPTS["base_model.model.".len()..]), prompts, "{kind}");
    }
    Ok(())
}

#[test]
fn features_of_no_saved_module_stay_one() -> Result<()> {
    let mut model = base()?;
    inject(&mut model, &config().modules_to_save(["mask_decoder", "mask_embed"]), 0)?;
    assert_eq!(features(&model), (features(&base()?).0, None));
    Ok(())
}

/// PEFT 0.21.2 prints these numbers, and 24 more of all: it counts the image's frozen features.
#[test]
fn features_count_once_they_are_trained() -> Result<()> {
    let count = |names: &[&str]| -> Result<_> {
        let (mut model, config) = (base()?, config().modules_to_save(names.iter().copied()));
        inject(&mut model, &config, 0)?;
        let report = count_parameters_as_peft(&model, &config)?;
        assert_eq!(report.trainable, count_parameters(&model).trainable);
        Ok((report.trainable, report.all))
    };
    let (trained, all) = count(&["no_mask_embed"])?;
    let (trained, all) = (trained - 24, all - 24);
    assert_eq!(count(&["shared_image_embedding"])?, (trained + 24, all + 24));
    assert_eq!(count(&["shared_embedding"])?, (trained + 24, all + 24));
    assert_eq!(count(&["embedding"])?, (trained + 48, all + 48));
    Ok(())
}

#[test]
fn training_moves_the_features_of_prompts_alone() -> Result<()> {
    let mut model = base()?;
    let config = config().modules_to_save(["prompt_encoder"]);
    inject(&mut model, &config, 0)?;
    let (image, prompts) = features(&model);
    assert_eq!(Some(&image), prompts.as_ref());
    assert_eq!(masks(&model)?, masks(&base()?)?);
    for (name, variable) in trainable_variables(&model)? {
        if name.ends_with("positional_embedding") {
            variable.set(&(variable.as_tensor() * 1.5)?)?;
        }
    }
    assert_eq!(features(&model).0, image);
    assert_ne!(masks(&model)?, masks(&base()?)?);
    let state = named_adapter_state(&model, "default", &config)?;
    let mut again = base()?;
    load_adapter_tensors(&mut again, "default", &config, state)?;
    assert_eq!(snapshot(&again), snapshot(&model));
    assert_eq!(masks(&again)?, masks(&model)?);
    set_trainable(&mut again, |_| false)?;
    assert_eq!(count_parameters(&again).trainable, 0);
    assert_eq!(masks(&again)?, masks(&model)?);
    Ok(())
}

#[test]
fn merged_features_travel_in_checkpoints() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    for kind in KINDS {
        let mut model = adapted(kind, &Device::Cpu)?;
        merge_and_unload(&mut model)?;
        checkpoint::save(&model, &path, Naming::HuggingFace, None)?;
        let mut plain = base()?;
        checkpoint::load(&mut plain, &path)?;
        assert_eq!(features(&plain), features(&model), "{kind}");
        assert_eq!(masks(&plain)?, masks(&model)?, "{kind}");

        let original = checkpoint::save(&model, &path, Naming::Original, None);
        let error = original.unwrap_err().to_string();
        assert!(
            error.contains("shared_embedding.positional") && error.contains("differ here"),
            "{error}"
        );
        // A part with features of its own takes them; one without cannot; others need none.
        checkpoint::load(&mut plain.vision_encoder, &path)?;
        checkpoint::load(&mut plain.mask_decoder, &path)?;
        checkpoint::load(&mut plain.prompt_encoder, &path)?;
        let error = checkpoint::load(&mut base()?.prompt_encoder, &path).unwrap_err().to_string();
        assert!(error.contains("differ here"), "{error}");
        assert_eq!(masks(&plain)?, masks(&model)?, "{kind}");

        // A checkpoint with one tensor for both gives both.
        checkpoint::load(&mut plain, model::folder("tiny"))?;
        assert_eq!(masks(&plain)?, masks(&base()?)?, "{kind}");
        checkpoint::save(&plain, &path, Naming::Original, None)?;
    }
    Ok(())
}

#[test]
fn ejecting_keeps_what_was_trained() -> Result<()> {
    let mut model = adapted("save_both_embeddings", &Device::Cpu)?;
    let before = features(&model);
    unload(&mut model)?;
    assert_eq!(features(&model), before);
    Ok(())
}

/// Loads the composite adapter with its tensors changed.
fn load_changed(change: impl FnOnce(&mut Tensors)) -> candle_sam_lora::Result<SamModel> {
    let dir = changed(&folder("save_composite_bias_all"), change);
    let mut model = base().unwrap();
    load_adapter(&mut model, dir.path()).map(|_| model)
}

#[test]
fn wrapped_biases_are_copies_under_any_name() -> Result<()> {
    let expected = snapshot(&adapted("save_composite_bias_all", &Device::Cpu)?);
    for name in [".modules_to_save.cells.", ".modules_to_save."] {
        let model = load_changed(|tensors| {
            let renamed = std::mem::take(tensors).into_iter();
            *tensors = renamed
                .map(|(key, t)| (key.replace(".modules_to_save.default.", name), t))
                .collect();
        })?;
        assert_eq!(snapshot(&model), expected, "{name}");
    }
    // PEFT reads the plain bias, whatever its copies say.
    let model = load_changed(|tensors| {
        for (key, tensor) in tensors.iter_mut() {
            if key.contains(".original_module.") || key.contains(".modules_to_save.") {
                *tensor = tensor.zeros_like().unwrap();
            }
        }
    })?;
    assert_eq!(snapshot(&model), expected);
    Ok(())
}

#[test]
fn what_is_no_copy_of_a_bias_is_surplus() -> Result<()> {
    let surplus = |change: &dyn Fn(&mut Tensors)| match load_changed(change) {
        Err(Error::Mismatch(mismatch)) => (mismatch.missing, mismatch.surplus),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("loaded"),
    };
    let plain = BIAS.replace(".modules_to_save.default.", ".");
    let (missing, found) = surplus(&|tensors| drop(tensors.remove(&plain)));
    assert_eq!(missing, std::slice::from_ref(&plain));
    assert_eq!(
        found,
        [BIAS.to_string(), BIAS.replace("modules_to_save.default", "original_module")]
    );
    let wide = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    let (_, found) = surplus(&|tensors| drop(tensors.insert(BIAS.into(), wide.clone())));
    assert_eq!(found, [BIAS]);
    let weight = BIAS.replace(".bias", ".weight");
    let (_, found) = surplus(&|tensors| drop(tensors.insert(weight.clone(), wide.clone())));
    assert_eq!(found, [weight]);
    Ok(())
}

#[test]
fn modules_that_peft_refuses_or_cannot_load_are_refused() -> Result<()> {
    let before = snapshot(&base()?);
    for (names, expected) in [
        (&["mask_decoder", "iou_prediction_head"][..], "iou_prediction_head lies in mask_decoder"),
        (&["neck", "conv1"], "vision_encoder.neck.conv1 lies in vision_encoder.neck"),
        (&["prompt_encoder", "shared_embedding"], "shared_embedding lies in prompt_encoder"),
        (&["point_embed"], "prompt_encoder.point_embed is a list"),
        (&["output_hypernetworks_mlps"], "name its elements, as mask_decoder.output"),
        (&["positional_embedding"], "no module is called \"positional_embedding\""),
        (&["encoder"], "choose one"),
    ] {
        let mut model = base()?;
        let config = config().modules_to_save(names.iter().copied());
        let error = inject(&mut model, &config, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{names:?}: {error}");
        assert_eq!(snapshot(&model), before);
    }
    let mut model = base()?;
    inject(&mut model, &config().modules_to_save(["point_embed.1", "mlps.0", "mlps.1"]), 0)?;
    Ok(())
}

#[test]
fn an_adapter_with_a_module_in_another_names_its_file() -> Result<()> {
    let (mut config, tensors) = read_adapter(folder("save_prompt_encoder"))?;
    config.modules_to_save = Some(vec!["prompt_encoder".into(), "mask_embed".into()]);
    let dir = written(&config, &tensors);
    let error = load_adapter(&mut base()?, dir.path()).unwrap_err().to_string();
    assert!(error.contains(CONFIG_FILE) && error.contains("lies in prompt_encoder"), "{error}");
    Ok(())
}

/// PEFT passes over such names, as those it adds itself for some task types.
#[test]
fn files_may_name_modules_that_are_not_there() -> Result<()> {
    let (mut config, tensors) = read_adapter(folder("save_prompt_encoder"))?;
    let names = config.modules_to_save.as_mut().context("modules to save")?;
    names.extend(["classifier".into(), "positional_embedding".into()]);
    config.task_type = Some("SEQ_CLS".into());
    let dir = written(&config, &tensors);
    let mut model = base()?;
    load_adapter(&mut model, dir.path())?;
    assert_eq!(snapshot(&model), snapshot(&adapted("save_prompt_encoder", &Device::Cpu)?));
    Ok(())
}

#[test]
fn biases_of_saved_modules_are_written_once() -> Result<()> {
    let mut model = base()?;
    let config = config().bias(BiasTraining::All).modules_to_save(["neck"]);
    inject(&mut model, &config, 0)?;
    let state = named_adapter_state(&model, "default", &config)?;
    let biases: Vec<_> = state.keys().filter(|key| key.contains("neck.layer_norm1.bias")).collect();
    assert_eq!(biases, ["base_model.model.vision_encoder.neck.layer_norm1.bias"]);
    Ok(())
}
