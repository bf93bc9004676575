//! The image encoder as a CUDA graph: replays give the bits of plain launches, for every input of the recorded shape.

use crate::common::model::model_on;
use crate::common::{random, values};
use crate::{trial, with_each};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_sam_lora::cuda::Graphed;
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::AttentionKind;
use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![trial("graphed input".to_string(), inputs_are_checked)];
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for kind in [AttentionKind::Fused, AttentionKind::Split] {
            let name = format!("graphed encoder {kind:?} {}", dtype.as_str());
            trials.push(trial(name, move |device| {
                with_each(device, || encoder(kind, dtype, device).map_err(Error::wrap))
            }));
        }
    }
    trials
}

fn encoder(kind: AttentionKind, dtype: DType, device: &Device) -> anyhow::Result<()> {
    let model = model_on(device, "tiny", kind, dtype)?;
    let (encoder, side) = (&model.vision_encoder, model.config().vision_config.image_size);
    let pixels = |seed| random(seed, (2, 3, side, side)).to_device(device)?.to_dtype(dtype);
    let graphed = Graphed::capture(&pixels(1)?, |x| encoder.forward(x, Mode::Eval))?;
    let mut outputs = Vec::new();
    for seed in [1, 2, 3, 1] {
        outputs.push((seed, graphed.run(&pixels(seed)?)?));
    }
    for (seed, got) in &outputs {
        let expected = encoder.forward(&pixels(*seed)?, Mode::Eval)?;
        assert_eq!(got.dims(), expected.dims());
        assert!(values(got) == values(&expected), "input {seed}: other bits than plain launches");
    }
    assert!(values(&outputs[0].1) != values(&outputs[1].1), "the input is not read");
    Ok(())
}

/// Besides: a variable that is set is read by the next replay.
fn inputs_are_checked(device: &Device) -> Result<()> {
    let weight = Var::zeros((1, 4), DType::F32, device)?;
    let x = random(5, (3, 4)).to_device(device)?;
    let graphed = Graphed::capture(&x, |x| x.broadcast_add(&weight.as_detached_tensor()))?;
    assert_eq!(values(&graphed.run(&x)?), values(&x));
    weight.set(&Tensor::ones((1, 4), DType::F32, device)?)?;
    assert_eq!(values(&graphed.run(&x)?), values(&(&x + 1.0)?));
    // A transposed tensor of the same shape is read as any other.
    let transposed = random(6, (4, 3)).to_device(device)?.t()?;
    assert_eq!(values(&graphed.run(&transposed)?), values(&(&transposed + 1.0)?));
    for other in [x.narrow(0, 0, 2)?, x.to_dtype(DType::F16)?, x.to_device(&Device::Cpu)?] {
        let message = graphed.run(&other).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("recorded"), "{message}");
    }
    let on_the_host =
        Graphed::capture(&x, |x| Tensor::new(x.sum_all()?.to_vec0::<f32>()?, x.device()));
    assert!(on_the_host.is_err(), "a value was read on the host");
    // The stream is in order after a capture that failed.
    assert_eq!(values(&graphed.run(&x)?), values(&(&x + 1.0)?));
    Ok(())
}
