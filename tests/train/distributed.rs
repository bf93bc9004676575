//! N ranks give the bits of one process with N times the accumulation, and a failure of one is told by all.

use crate::run::{adapted, alone, bits, go_on, loss, trainer, KINDS, PARTS};
use crate::threads::on_threads;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_sam_lora::nn::set_trainable;
use candle_sam_lora::train::{
    share, together, AdamWConfig, Alone, Communicator, Trainer, TrainerConfig,
};
use candle_sam_lora::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const STEPS: u64 = 3;

#[test]
fn any_number_of_ranks_gives_the_bits_of_one() -> Result<()> {
    for kind in KINDS {
        let expected = alone(kind, STEPS)?;
        for size in [2, 3, 4] {
            let found = on_threads(size, |communicator| {
                let sam = adapted(kind)?;
                let mut run = trainer(&sam, communicator)?;
                go_on(&mut run, &sam, STEPS)?;
                bits(&run, &sam)
            });
            for (rank, found) in found.into_iter().enumerate() {
                assert_eq!(found?, expected, "{kind}: rank {rank} of {size}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_order_of_the_sum_is_seen_in_the_bits() -> Result<()> {
    // Or the test above would pass for sums in any order: two ranks, each adding up its own half first.
    let sam = adapted("lora")?;
    let names: Vec<_> = candle_sam_lora::nn::trainable_variables(&sam)?;
    let gradients = |part: u64| -> Result<Vec<f32>> {
        let store = loss(&sam, part, candle_sam_lora::nn::Mode::Eval)?.backward()?;
        let mut all = vec![];
        for (_, var) in &names {
            all.extend(store.get(var).expect("a gradient").flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(all)
    };
    let add = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).map(|(a, b)| a + b).collect::<Vec<f32>>();
    let parts = (0..PARTS).map(gradients).collect::<Result<Vec<_>>>()?;
    let fold = |every: usize, first: usize| {
        parts.iter().skip(first).step_by(every).cloned().reduce(add).expect("parts")
    };
    assert_ne!(fold(1, 0), add(fold(2, 0), fold(2, 1)));
    Ok(())
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let expected = alone("lora", STEPS)?;
    for (steps, size) in [(1, 2), (2, 4), (STEPS, 1)] {
        let found = on_threads(size, |communicator| -> Result<_> {
            let sam = adapted("lora")?;
            let mut run = trainer(&sam, communicator)?;
            if steps > 1 {
                assert!(run.resume(&path)?.is_none());
            }
            go_on(&mut run, &sam, steps)?;
            run.save(&path)?;
            bits(&run, &sam)
        });
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;
        if steps == STEPS {
            assert_eq!(found[0], expected);
        }
    }
    // Another number of parts a step is another run.
    let refused = on_threads(5, |communicator| {
        trainer(&adapted("lora").expect("a model"), communicator).expect("a trainer").resume(&path)
    });
    for error in refused {
        let error = error.expect_err("10 parts in the place of 12").to_string();
        assert!(error.contains("accumulation: was 12, is 10"), "{error}");
    }
    Ok(())
}

#[test]
fn rank_0_alone_reads_the_state() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |rank: usize| folder.path().join(rank.to_string()).join("state.safetensors");
    std::fs::create_dir(folder.path().join("0"))?;
    let run = |steps: u64, resumes: bool| -> Result<Vec<_>> {
        let found = on_threads(3, |communicator| -> Result<_> {
            let (sam, path) = (adapted("lora")?, path(communicator.rank()));
            let mut run = trainer(&sam, communicator)?;
            let damage = if resumes { run.resume(&path)? } else { None };
            while run.steps() < steps {
                let next = run.steps() + 1;
                go_on(&mut run, &sam, next)?;
                run.save(&path)?;
            }
            Ok((bits(&run, &sam)?, damage.is_some()))
        });
        found.into_iter().collect()
    };
    run(2, false)?;
    std::fs::write(path(0), b"damaged")?;
    let expected = alone("lora", STEPS)?;
    for (rank, (found, damaged)) in run(STEPS, true)?.into_iter().enumerate() {
        assert!(found == expected, "rank {rank}: other bits");
        assert_eq!(damaged, rank == 0);
    }
    assert!(!path(1).exists() && !path(2).exists());
    Ok(())
}

/// The errors of the ranks of a run of which one has something else.
fn errors(
    size: usize,
    work: impl Fn(usize, Arc<dyn Communicator>) -> Result<()> + Sync,
) -> Vec<String> {
    let found = on_threads(size, |communicator| work(communicator.rank(), communicator));
    found.into_iter().map(|result| result.expect_err("a rank went on").to_string()).collect()
}

#[test]
fn what_fails_on_one_rank_is_told_by_all_and_changes_nothing() -> Result<()> {
    let untouched = adapted("lora")?;
    let untouched = bits(&trainer(&untouched, Arc::new(Alone))?, &untouched)?;
    let found = errors(3, |_, communicator| {
        let sam = adapted("lora")?;
        let mut run = trainer(&sam, communicator)?;
        let step = run.step(|part, mode| match part {
            7 => Tensor::new(f32::NAN, &Device::Cpu),
            _ => loss(&sam, part, mode),
        });
        assert_eq!(bits(&run, &sam)?, untouched);
        step?;
        Ok(())
    });
    for error in found {
        assert!(error.starts_with("rank 1: train: step 1: the loss is NaN"), "{error}");
    }
    Ok(())
}

#[test]
fn ranks_with_different_runs_are_told_what_differs() {
    let different = |what: &'static str| {
        errors(2, move |rank, communicator| {
            let other = rank == 1;
            let mut sam = adapted("lora")?;
            if what == "frozen" && other {
                let bias = &mut sam.vision_encoder.patch_embed.projection.bias;
                *bias = Some(bias.as_ref().map_or_else(|| unreachable!(), |b| b + 1.0)?);
            }
            if what == "parameters" && other {
                let (_, var) = &candle_sam_lora::nn::trainable_variables(&sam)?[0];
                var.set(&(var.as_tensor() + 1.0)?)?;
            }
            if what == "trainable" && other {
                set_trainable(&mut sam, |name| name.contains("lora_A"))?;
            }
            let lr = if what == "lr" && other { 0.02 } else { 0.01 };
            let config = TrainerConfig::from(AdamWConfig { lr, ..Default::default() });
            let seed = u64::from(what == "seed" && other);
            let run = Trainer::new(&sam, TrainerConfig { seed, ..config })?;
            let data = serde_json::json!(if what == "data" && other { 5 } else { 6 });
            let settings = serde_json::Map::from_iter([("images".to_string(), data)]);
            let mut run = run.with_settings(settings).with_communicator(communicator)?;
            run.step(|part, mode| loss(&sam, part, mode))?;
            Ok(())
        })
    };
    for (what, told) in [
        ("lr", "lr: 0.02, on rank 0 0.01"),
        ("data", "images: 5, on rank 0 6"),
        ("seed", "seed: 1, on rank 0 0"),
        ("frozen", "model: "),
        ("parameters", "parameters: "),
        ("trainable", "model: "),
    ] {
        for error in different(what) {
            let expected = "rank 1: its run is not that of rank 0:";
            assert!(error.starts_with(expected) && error.contains(told), "{what}: {error}");
        }
    }
}

#[test]
fn a_disk_that_is_full_on_rank_0_stops_all() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("no such folder").join("state.safetensors");
    let found = errors(3, |_, communicator| {
        let sam = adapted("lora")?;
        trainer(&sam, communicator)?.save(&path)?;
        Ok(())
    });
    assert!(found.iter().all(|error| error.starts_with("rank 0: ")), "{found:?}");
    Ok(())
}

#[test]
fn work_alone_keeps_its_own_error() {
    let own = || Error::config("mine");
    let error = together(&Alone, Err::<(), _>(own()), |()| vec![]).expect_err("it failed");
    assert_eq!(error.to_string(), own().to_string());
}

/// Items and who did them, in the order in which rank 0 collected them.
type Collected = Vec<(usize, usize)>;

/// The items that were collected, and how each rank ended; `work` gets rank and item.
fn shared(
    size: usize,
    count: usize,
    work: impl Fn(usize, usize) -> Result<(), Error> + Sync,
) -> (Collected, Vec<Result<(), String>>) {
    let collected = Mutex::new(vec![]);
    let ended = on_threads(size, |communicator| {
        let rank = communicator.rank();
        let work = |item: usize, alive: &dyn Fn()| {
            alive();
            work(rank, item).map(|()| vec![rank as u8])
        };
        let collect = |item: usize, told: Vec<u8>| {
            assert_eq!(rank, 0, "results go to the first rank");
            collected.lock().expect("no panic").push((item, usize::from(told[0])));
            Ok(())
        };
        share(&*communicator, count, work, collect).map_err(|error| error.to_string())
    });
    (collected.into_inner().expect("no panic"), ended)
}

#[test]
fn a_slow_item_holds_up_its_rank_alone() {
    for size in [1, 2, 3] {
        for count in [0, 1, 2, 30] {
            let (mut found, ended) = shared(size, count, |rank, _| {
                // The last rank is slow.
                let slow = rank > 0 && rank + 1 == size;
                std::thread::sleep(Duration::from_millis(if slow { 200 } else { 1 }));
                Ok(())
            });
            assert!(ended.iter().all(Result::is_ok), "{ended:?}");
            found.sort();
            assert!(found.iter().map(|(item, _)| *item).eq(0..count), "{size} {count}: {found:?}");
            let by_last = found.iter().filter(|(_, rank)| rank + 1 == size).count();
            assert!(size == 1 || count < 30 || by_last < 5, "the slow rank did {by_last}");
        }
    }
}

#[test]
fn the_first_item_that_fails_is_the_error_of_all() {
    let (found, ended) = shared(3, 60, |rank, item| {
        std::thread::sleep(Duration::from_millis(if item == 10 { 60 } else { 2 }));
        match item {
            // The later one fails sooner.
            10 | 12 => Err(Error::config(format!("{item} on {rank}"))),
            _ => Ok(()),
        }
    });
    let before = found.iter().filter(|(item, _)| *item < 10).count();
    assert!(before == 10 && found.len() < 59, "{found:?}");
    for error in &ended {
        let error = error.as_ref().expect_err("an item failed");
        assert!(error.contains(": 10 on ") && error.starts_with("rank "), "{error}");
        assert_eq!(Some(error), ended[0].as_ref().err());
    }
}
