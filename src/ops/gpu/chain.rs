//! Layers in a row by the kernels of a GPU, as one node of candle's graph: `last(.. first(x))`, or that plus x.
//!
//! Only projections may be trained in it. A layer runs when it is added, and its input is kept if its backward reads
//! it. The backward of a frozen projection does not, so a frozen MLP keeps neither normed nor activated rows. Gradients
//! go from layer to layer; those of `x` and of the trained parameters alone reach candle's store.
//!
//! While [`joined`] does its work, a chain on the last one's output goes on with it, as one node. So the gradient
//! between them does not pass through candle's store, which would fill a tensor with zeros and add to it.

use super::projection::{Projections, Saved};
use super::rel_pos_attention::Attention;
use crate::driver;
use crate::ops::computed;
use crate::ops::Gradients;
use candle_core::{bail, CudaStorage, Result, Shape, Storage, Tensor, TensorId};
use std::cell::RefCell;
use std::sync::Arc;

/// Trained inputs that a node of candle's can have, beside x.
const MOST_PACKED: usize = 2;

/// The output of the last chain, and its node.
type Last = Option<(TensorId, Arc<Node>)>;

thread_local! {
    /// None where chains are not joined.
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

/// Does work whose chains are joined. If anybody but the next chain uses a chain's output too, the layers before run
/// their backward twice.
pub fn joined<T>(work: impl FnOnce() -> T) -> T {
    /// Ends the joining, however the work ends.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            LAST.set(None);
        }
    }
    if LAST.with_borrow(Option::is_some) {
        return work();
    }
    LAST.set(Some(None));
    let _end = End;
    work()
}

/// Layers that have run, for their backward.
struct Node {
    stages: Vec<Stage>,
    /// Input of the first layer, with a graph if there is no node before.
    x: Tensor,
    /// Whether x was added to the last layer's output.
    residual: bool,
    /// Trained parameters of layers, packed, those of the nodes before included.
    packed: Vec<Tensor>,
    /// Number of the packed ones that belong to nodes before.
    packed_before: usize,
    before: Option<Arc<Node>>,
}

/// Layers that have run on `x`.
pub struct Chain {
    op: &'static str,
    x: Tensor,
    stages: Vec<Stage>,
    /// Output of the last layer, unless that is attention, which keeps it.
    out: Option<(CudaStorage, Shape)>,
    /// Trained parameters of layers, packed.
    packed: Vec<Tensor>,
}

/// A layer, for its backward.
struct Stage {
    layer: Layer,
    /// None where nobody reads it, and for the first layer, whose input is the chain's.
    input: Option<Tensor>,
}

enum Layer {
    Norm {
        eps: f64,
        weight: Tensor,
        bias: Tensor,
    },
    /// With the place of its trained parameters among the packed ones, if they are packed.
    Projections {
        call: Projections,
        saved: Saved,
        packed: Option<usize>,
    },
    Attention {
        call: Attention,
        pad: Option<Tensor>,
        lse: Tensor,
        out: Tensor,
    },
}

impl Chain {
    /// No layer yet on a contiguous `x`; `op` names the chain in errors.
    pub fn new(op: &'static str, x: Tensor) -> Self {
        Self { op, x, stages: vec![], out: None, packed: vec![] }
    }

    /// The next layer's input; that of the first one is x.
    pub fn input(&mut self) -> Tensor {
        match (self.out.take(), self.stages.last()) {
            (Some((storage, shape)), _) => driver::tensor(storage, shape),
            (None, Some(Stage { layer: Layer::Attention { out, .. }, .. })) => out.clone(),
            (None, _) => self.x.clone(),
        }
    }

    /// Whether a gradient goes to what has run.
    pub fn is_tracked(&self) -> bool {
        self.x.track_op() || !self.packed.is_empty()
    }

    /// LayerNorm of `input` with frozen parameters.
    pub fn layer_norm(
        &mut self,
        input: Tensor,
        eps: f64,
        [weight, bias]: [Tensor; 2],
    ) -> Result<()> {
        self.out = Some(super::layer_norm::forward(eps, [&input, &weight, &bias])?);
        let reads = self.is_tracked();
        self.push(Layer::Norm { eps, weight, bias }, input, reads);
        Ok(())
    }

    /// Projections of `input`, plus x if `residual`.
    pub fn projections(
        &mut self,
        input: Tensor,
        (call, packed): (Projections, Option<Tensor>),
        residual: bool,
    ) -> Result<()> {
        let inputs = [&input, packed.as_ref().unwrap_or(&input), &self.x];
        let (out, shape, saved) = call.forward(inputs, residual)?;
        self.out = Some((out, shape));
        let trained = call.is_trained();
        let index = packed.is_some().then_some(self.packed.len());
        self.packed.extend(packed);
        self.push(Layer::Projections { call, saved, packed: index }, input, trained);
        Ok(())
    }

    /// Attention on `input`, whose tables and pad are frozen.
    pub fn attention(
        &mut self,
        input: Tensor,
        (call, pad): (Attention, Option<Tensor>),
    ) -> Result<()> {
        let inputs = [&input, &input, pad.as_ref().unwrap_or(&input)];
        let (out, shape, lse) = call.forward(inputs)?;
        let out = driver::tensor(out, shape);
        let reads = self.is_tracked();
        self.push(Layer::Attention { call, pad, lse, out }, input, reads);
        Ok(())
    }

    fn push(&mut self, layer: Layer, input: Tensor, reads: bool) {
        let input = (reads && !self.stages.is_empty()).then_some(input);
        self.stages.push(Stage { layer, input });
    }

    /// The last layer's output, as a function of x and of the trained parameters. `residual` says whether x was added.
    ///
    /// # Errors
    /// - there is no layer, or more of them are trained than candle's nodes have inputs.
    pub fn run(self, residual: bool) -> Result<Tensor> {
        let Self { op, x, stages, out, mut packed } = self;
        let (Some((storage, shape)), true) = (out, packed.len() <= MOST_PACKED) else {
            bail!("{op}: a chain has a layer, and at most two trained ones")
        };
        if residual && !matches!(stages.first(), Some(Stage { layer: Layer::Norm { .. }, .. })) {
            bail!("{op}: a chain with a residual begins with a norm")
        }
        let fits = |node: &Arc<Node>| node.packed.len() + packed.len() <= MOST_PACKED;
        let last = LAST.with_borrow(|last| last.clone().flatten());
        let before = last.filter(|(id, node)| *id == x.id() && fits(node)).map(|(_, node)| node);
        let (mut first, mut packed_before) = (x.clone(), 0);
        if let Some(before) = &before {
            first = before.first().x.clone();
            packed_before = before.packed.len();
            packed.splice(..0, before.packed.iter().cloned());
        }
        let x = if before.is_some() { x.detach() } else { x };
        let node = Arc::new(Node { stages, x, residual, packed, packed_before, before });

        let inputs = (&first, node.packed.first(), node.packed.get(1));
        let value = (Storage::Cuda(storage), shape);
        let of = node.clone();
        let out = computed::node(op, inputs, value, move |_, _, grad| of.gradients(grad))?;
        if out.track_op() {
            LAST.with_borrow_mut(|last| {
                if let Some(last) = last {
                    *last = Some((out.id(), node));
                }
            });
        }
        Ok(out)
    }
}

impl Node {
    /// The first of the nodes that are joined.
    fn first(&self) -> &Self {
        let mut node = self;
        while let Some(before) = &node.before {
            node = before;
        }
        node
    }

    /// The gradients of the first node's x and of the packed parameters.
    fn gradients(&self, grad: &Tensor) -> Result<Gradients> {
        let (mut node, mut grad, mut of_packed) = (self, grad.detach(), [None, None]);
        loop {
            let dx = node.backward(grad, &mut of_packed[node.packed_before..])?;
            match (dx, &node.before) {
                (Some(dx), Some(before)) => (node, grad) = (before, dx),
                (dx, _) => {
                    let [first, second] = of_packed;
                    return Ok((dx.filter(|_| node.x.track_op()), first, second));
                }
            }
        }
    }

    /// The gradient of x, if it or anything before a layer wants one; those of the node's own packed parameters go to
    /// `of_packed`. The first layer, a norm, adds the gradient of a residual to that of x.
    fn backward(&self, grad: Tensor, of_packed: &mut [Option<Tensor>]) -> Result<Option<Tensor>> {
        let Self { stages, x, .. } = self;
        let tracked = self.before.is_some() || x.track_op();
        let packed = &self.packed[self.packed_before..];
        let residual = self.residual.then(|| grad.clone());
        let mut grad = grad;
        for (index, Stage { layer, input }) in stages.iter().enumerate().rev() {
            let is_trained = |stage: &Stage| match &stage.layer {
                Layer::Projections { call, .. } => call.is_trained(),
                _ => false,
            };
            let before = tracked || stages[..index].iter().any(is_trained);
            // Where nobody reads the input, the gradient stands in for it.
            let input = match (index, input) {
                (0, _) => x,
                (_, Some(input)) => input,
                (_, None) => &grad,
            };
            let dx = match layer {
                _ if !before && !is_trained(&stages[index]) => return Ok(None),
                Layer::Norm { eps, weight, bias } => {
                    let residual = residual.as_ref().filter(|_| index == 0);
                    super::layer_norm::backward(*eps, [input, weight, bias], &grad, residual)?.0
                }
                Layer::Projections { call, saved, packed: at } => {
                    let parameters = at.map_or(input, |at| &packed[at]);
                    let (dx, dparameters) =
                        call.backward([input, parameters], before, saved, &grad)?;
                    if let Some(at) = at {
                        of_packed[*at] = dparameters;
                    }
                    dx
                }
                Layer::Attention { call, pad, lse, out } => {
                    // Its tables are frozen, and the gradient stands in for what is not there.
                    let pad = pad.as_ref().unwrap_or(&grad);
                    call.backward([input, &grad, pad], (out, lse), &grad)?.0
                }
            };
            match dx {
                Some(dx) => grad = dx,
                None => return Ok(None),
            }
        }
        Ok(Some(grad))
    }
}
