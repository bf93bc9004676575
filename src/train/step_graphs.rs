//! Losses whose training steps are recorded as CUDA graphs, and the inputs of these steps.

use crate::ops::recorded::RecordedStep;
use candle_core::{Result, Tensor, Var};
use std::collections::HashMap;

/// Most forms of inputs that are recorded; each graph may take the memory of a step.
pub(super) const MOST_FORMS: usize = 8;

/// Input of a step's loss, besides the model: tensors, and what decides on the launches.
///
/// [Example](crate::train::StepGraphs)
pub trait StepInput: Sized {
    /// The same input with every tensor replaced, always in the same order.
    ///
    /// # Errors
    /// - `change` fails.
    fn map(&self, change: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self>;

    /// Whatever decides on the launches besides the tensors' shapes and dtypes. None if the loss asks for values on the
    /// host, so that no graph can hold it.
    fn form(&self) -> Option<String>;
}

/// Tensors whose shapes and dtypes decide.
impl StepInput for Vec<Tensor> {
    fn map(&self, change: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        self.iter().map(change).collect()
    }

    fn form(&self) -> Option<String> {
        Some(String::new())
    }
}

/// A loss, and CUDA graphs of the steps that were made with it by [`Trainer::step_by_graph`]: forward, backward and
/// optimizer.
///
/// There is a graph for each form of the input: its shapes, its dtypes and [`StepInput::form`]. The first step of a
/// form runs as ever, the second one is recorded, and it and all later ones are replayed. Copied before each replay are
/// the input, the seed of the dropout masks and the learning rate. So a replay has the bits of plain launches.
///
/// A graph reads the model's tensors in place, so this owns the loss and all that the loss owns or borrows. The loss's
/// host code runs only while a graph is recorded: the active adapter and the kernels are those of that time. Graphs
/// stay on their thread.
///
/// ```no_run
/// # fn main() -> candle_sam_lora::Result<()> {
/// use candle_core::{DType, Tensor};
/// use candle_sam_lora::nn::Linear;
/// use candle_sam_lora::train::{StepGraphs, Trainer, TrainerConfig};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let device = candle_sam_lora::device("cuda")?;
/// let model = Linear::load(4, 2, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device))?;
/// let mut trainer = Trainer::new(&model, TrainerConfig::new(1e-2))?;
/// let loss = |x: &Vec<Tensor>, mode| (model.forward(&x[0], mode)? - 1.0)?.sqr()?.mean_all();
/// let mut graphs = StepGraphs::new(loss);
/// for _ in 0..100 {
///     let input = |_part| Ok(vec![Tensor::randn(0f32, 1f32, (8, 4), &device)?]);
///     trainer.step_by_graph(&mut graphs, input)?;
/// }
/// println!("{} graphs: {} steps by them, {} plain", graphs.recorded(), graphs.replayed(), graphs.plain());
/// # Ok(())
/// # }
/// ```
///
/// [`Trainer::step_by_graph`]: crate::train::Trainer::step_by_graph
pub struct StepGraphs<F> {
    // Fields are dropped in this order: the graphs before what they read.
    pub(super) forms: HashMap<String, Option<RecordedForm>>,
    pub(super) loss: F,
    pub(super) replayed: u64,
    pub(super) plain: u64,
}

impl<F> StepGraphs<F> {
    /// No graph yet.
    pub fn new(loss: F) -> Self {
        Self { forms: HashMap::new(), loss, replayed: 0, plain: 0 }
    }

    /// How many forms of inputs are recorded.
    pub fn recorded(&self) -> usize {
        self.forms.values().flatten().count()
    }

    /// How many steps were launched as graphs.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// How many steps were launched operation by operation, those before a recording among them.
    pub fn plain(&self) -> u64 {
        self.plain
    }
}

/// A recorded step, and all that it reads and changes besides the model.
pub(super) struct RecordedForm {
    // Fields are dropped in this order: the graph before its tensors.
    pub step: RecordedStep,
    /// Where its input lies.
    pub input: Vec<Var>,
    /// Parameters and moments.
    pub changed: Vec<Tensor>,
}

impl RecordedForm {
    /// Whether the step changes these tensors.
    pub fn changes<'a>(&self, others: impl Iterator<Item = &'a Tensor>) -> bool {
        self.changed.iter().map(Tensor::id).eq(others.map(Tensor::id))
    }
}

/// The form of an input with its shapes and dtypes. None if no graph can hold the step.
pub(super) fn form_of(input: &impl StepInput) -> Result<Option<String>> {
    let Some(mut form) = input.form() else { return Ok(None) };
    input.map(&mut |tensor| {
        form += &format!("; {:?} {:?}", tensor.dims(), tensor.dtype());
        Ok(tensor.clone())
    })?;
    Ok(Some(form))
}
