//! The self-test of a family of native kernels: small random problems, forward and backward, beside the composed graph.
//!
//! ```text
//! truth      the operation on the CPU in f32: neither nvcc nor the driver nor cuBLAS takes part
//! composed   candle's operations on the GPU in the dtype: gives the bound
//! native     the kernels under test; if they are refused, the portable ones
//! ```

mod problems;

use crate::driver::{self, Key};
use crate::launch::family::Family;
use crate::launch::self_test::{
    bound, error, refusal, Choice, Comparison, SelfTestReport, SelfTestRow,
};
use crate::launch::Gpu;
use crate::ops::custom::Engine;
use candle_core::{bail, CudaDevice, DType, Device, Error, Result};
use problems::{By, Problem};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Held by the test that runs: another thread waits for what it finds.
static RUNNING: Mutex<()> = Mutex::new(());

/// Tests a family before its first use, and says so if it is refused.
///
/// # Errors
/// If the truth or the composed graph cannot be computed, as for want of memory.
pub fn first_use(device: &CudaDevice, key: Key, gpu: Gpu) -> Result<Choice> {
    let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    match driver::tested(device, key)? {
        Some(choice) => Ok(choice),
        None => {
            let start = Instant::now();
            let rows = test(device, key, gpu, false)?;
            let (family, dtype) = key;
            tracing::debug!("self-test of {family} in {}: {:?}", dtype.as_str(), start.elapsed());
            settle(device, key, &rows)
        }
    }
}

/// Tests every family of native kernels that this device can run, and the portable kernels that stand in for them, in
/// f16 and bf16. A family that is refused here is not used from now on. On a GPU without native kernels the portable
/// ones are tested.
///
/// [Example](crate::cuda)
///
/// # Errors
/// - the device is no GPU, or one without kernels: compute capability 8.0 and newer has them;
/// - its stream is being captured;
/// - the truth or the composed graph cannot be computed, as for want of memory.
pub fn self_test_report(device: &Device) -> Result<SelfTestReport> {
    let cuda = device.as_cuda_device()?;
    let Some(gpu) = driver::gpu(cuda) else {
        bail!("self-test: this crate has no kernels for {:?}", device.location())
    };
    if driver::is_capturing(cuda) {
        bail!("self-test: it waits for the GPU, which a stream that is captured cannot")
    }
    let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let name = cuda.cuda_stream().context().name().map_err(Error::wrap)?;
    let mut report = SelfTestReport { device: name, compiler: driver::COMPILER, rows: vec![] };
    for family in Family::ALL {
        for dtype in Family::DTYPES {
            let rows = test(cuda, (family, dtype), gpu, true)?;
            if gpu.native.is_some() {
                settle(cuda, (family, dtype), &rows)?;
            }
            report.rows.extend(rows);
        }
    }
    Ok(report)
}

/// Keeps what a test found; a refusal is told once.
fn settle(device: &CudaDevice, key: Key, rows: &[SelfTestRow]) -> Result<Choice> {
    let (choice, new) = driver::keep_test(device, key, rows)?;
    if let (true, Some(line)) = (new, refusal(rows, driver::COMPILER)) {
        tracing::warn!("{line}");
        eprintln!("candle-sam-lora: {line}");
    }
    Ok(choice)
}

/// A row for the native kernels, if there are any, and, if they fail or `all` are wanted, one for the portable kernels.
fn test(
    device: &CudaDevice,
    (family, dtype): Key,
    gpu: Gpu,
    all: bool,
) -> Result<Vec<SelfTestRow>> {
    let what = || format!("self-test of {family} in {}", dtype.as_str());
    let problems = problems::of(family);
    let expected = problems.iter().map(|problem| Expected::new(problem, dtype, device));
    let expected: Vec<_> = expected.collect::<Result<_>>().map_err(|e| e.context(what()))?;
    let mut rows = Vec::new();
    // Persistent blocks make several tiles each, as they do of a large problem on the whole device.
    let few_blocks = Gpu { multiprocessors: problems::BLOCKS, ..gpu };
    let native = gpu.native.map(|_| (Choice::Native, few_blocks));
    for (kernels, gpu) in native.into_iter().chain([(Choice::Portable, gpu.portable_only())]) {
        let mut row = SelfTestRow { family, dtype, kernels, comparisons: vec![], failure: None };
        let comparisons = expected.iter().map(|expected| expected.compare(gpu));
        match comparisons.collect::<Result<Vec<_>>>() {
            Ok(comparisons) => row.comparisons = comparisons.concat(),
            Err(failure) => row.failure = Some(failure.to_string()),
        }
        let passed = row.passed();
        rows.push(row);
        if passed && !all {
            break;
        }
    }
    Ok(rows)
}

/// A problem on the device, with its true results and their bounds.
struct Expected<'a> {
    problem: &'a Problem,
    inputs: problems::Inputs,
    truth: Vec<Vec<f32>>,
    bounds: Vec<f64>,
}

impl<'a> Expected<'a> {
    fn new(problem: &'a Problem, dtype: DType, device: &CudaDevice) -> Result<Self> {
        let host = problem.inputs()?.to_dtype(dtype)?;
        let inputs = host.to_device(&Device::Cuda(device.clone()))?;
        let wide = host.to_dtype(DType::F32)?;
        let truth = problem.results(&wide, By::Engine(Engine::Cpu))?;
        let composed = problem.results(&inputs, By::Composed)?;
        let errors = composed.iter().zip(&truth).map(|(got, truth)| error(got, truth));
        let bounds = errors.map(|error| bound(error, dtype)).collect();
        Ok(Self { problem, inputs, truth, bounds })
    }

    fn compare(&self, gpu: Gpu) -> Result<Vec<Comparison>> {
        let mut comparisons = Vec::new();
        for case in self.problem.cases(gpu) {
            let by = By::Engine(Engine::Gpu(case.0));
            let got = self.problem.results(&self.inputs, by)?;
            for (index, name) in self.problem.result_names().iter().enumerate() {
                let (got, truth) = (&got[index], &self.truth[index]);
                let result = format!("{}{} {name}", self.problem.name(), case.suffix());
                let (error, bound) = (error(got, truth), self.bounds[index]);
                comparisons.push(Comparison { result, error, bound });
            }
        }
        Ok(comparisons)
    }
}
