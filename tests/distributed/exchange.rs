//! The bits do not depend on how gradients travel, on the network, or on threads; the times of a step say where it
//! went.

use super::network::Network;
use super::run::{adapted, bits, go_on, loss, trainer, KINDS, PARTS};
use super::threads::on_threads;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::nn::{randomize, set_trainable, trainable_variables, Linear};
use candle_sam_lora::train::{Alone, Communicator, StepRng, StepTimes, Trainer, TrainerConfig};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of all ranks' gradients that are exchanged whole, at most.
const SMALL: usize = 128 << 10;

/// Bits of a model of `len` parameters after two steps of 6 parts, and how often chunks of gradients were exchanged.
fn trained(len: usize, communicator: Arc<dyn Communicator>) -> Result<(Vec<u32>, usize)> {
    let mut model = Linear::load(len - 1, 1, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    randomize(&mut model, 0, 1.0)?;
    set_trainable(&mut model, |_| true)?;
    let accumulation = 6 / communicator.size() as u64;
    let config = TrainerConfig { accumulation, ..TrainerConfig::new(0.01) };
    let network = Arc::new(Network::new(communicator, Duration::ZERO, f64::INFINITY));
    let mut trainer = Trainer::new(&model, config)?.with_communicator(network.clone())?;
    for _ in 0..2 {
        trainer.step(|part, _| {
            let mut draws = StepRng::new(5, "x", part);
            let x: Vec<_> = (1..len).map(|_| draws.uniform() as f32 - 0.5).collect();
            Tensor::from_vec(x, (1, len - 1), &Device::Cpu)?.apply(&model)?.sqr()?.sum_all()
        })?;
    }
    let mut bits: Vec<u32> = trainer.losses().iter().map(|loss| loss.to_bits()).collect();
    for (_, var) in trainable_variables(&model)? {
        bits.extend(var.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
    }
    Ok((bits, network.divided.load(Ordering::Relaxed)))
}

#[test]
fn small_and_large_gradients_give_the_bits_of_one() -> Result<()> {
    for size in [2, 3, 6] {
        let largest = SMALL / 4 / size;
        // Not one for each rank; the two sides of the limit; chunks of different lengths.
        for (len, exchanges) in [(2, 0), (largest, 0), (largest + 1, 1), (2 * largest + 5, 1)] {
            let (expected, _) = trained(len, Arc::new(Alone))?;
            for found in on_threads(size, |communicator| trained(len, communicator)) {
                let (found, divided) = found?;
                assert!(found == expected, "{size} ranks, {len} parameters: other bits");
                assert_eq!(divided, exchanges * 2 * 6 / size, "{size} ranks, {len} parameters");
            }
        }
    }
    Ok(())
}

#[test]
fn the_bits_do_not_depend_on_threads() -> Result<()> {
    for kind in KINDS {
        let mut expected = None;
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let found = pool.install(|| -> Result<_> {
                let sam = adapted(kind)?;
                let mut run = trainer(&sam, Arc::new(Alone))?;
                go_on(&mut run, &sam, 2)?;
                bits(&run, &sam)
            })?;
            let expected = expected.get_or_insert_with(|| found.clone());
            assert!(found == *expected, "{kind}: other bits with {threads} threads");
        }
    }
    Ok(())
}

#[test]
fn delays_change_times_and_no_bits() -> Result<()> {
    const LATENCY: Duration = Duration::from_millis(5);
    const SLOW: Duration = Duration::from_millis(60);
    let run = |communicator: Arc<dyn Communicator>, is_slow: bool| -> Result<_> {
        let sam = adapted("lora")?;
        let mut run = trainer(&sam, communicator)?;
        for _ in 0..3 {
            run.step(|part, mode| {
                if is_slow {
                    std::thread::sleep(SLOW);
                }
                loss(&sam, part, mode)
            })?;
        }
        Ok((bits(&run, &sam)?, *run.times()))
    };
    let (expected, alone) = run(Arc::new(Alone), false)?;
    assert_eq!((alone.steps, alone.waiting, alone.exchange), (2, Duration::ZERO, Duration::ZERO));
    let found = on_threads(3, |communicator| {
        let is_slow = communicator.rank() == 2;
        let network = Network::new(communicator, LATENCY, 1e9);
        run(Arc::new(network), is_slow)
    });
    for found in found {
        let (found, times): (_, StepTimes) = found?;
        assert!(found == expected, "other bits");
        assert_eq!(times.steps, 2);
        let parts = 2 * PARTS as u32 / 3;
        assert!(times.exchange >= LATENCY * parts, "{times}");
        // Two of three wait; a busy machine delays them, too.
        assert!(times.waiting >= SLOW * parts / 6 && times.compute >= SLOW * parts / 3, "{times}");
    }
    Ok(())
}
