//! Layers in a row by the kernels of a GPU, as one node of candle's graph: `last(.. first(x))`, or that plus x.
//!
//! Only projections may be trained in it. A layer runs when it is added, and its input is kept if its backward reads it.
//! The backward of a frozen projection does not, so a frozen MLP keeps neither normed nor activated rows. Gradients go
//! from layer to layer; those of `x` and of the trained parameters alone reach candle's store.

use super::projection::{Projections, Saved};
use super::rel_pos_attention::Attention;
use crate::ops::computed::{node, three};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaStorage, Result, Shape, Storage, Tensor};

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

    /// The next layer's input, without a graph.
    pub fn input(&mut self) -> Tensor {
        match (self.out.take(), self.stages.last()) {
            (Some((storage, shape)), _) => {
                Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
            }
            (None, Some(Stage { layer: Layer::Attention { out, .. }, .. })) => out.clone(),
            (None, _) => self.x.detach(),
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
        let inputs = [input.clone(), weight.clone(), bias.clone()];
        self.out = Some(super::layer_norm::forward(eps, inputs)?);
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
        let (parameters, x) = (packed.as_ref().map(Tensor::detach), self.x.detach());
        let inputs = three((&input, parameters.as_ref(), residual.then_some(&x)));
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
        let (out, shape, lse) = call.forward(three((&input, None, pad.as_ref())))?;
        let out = Tensor::from_storage(Storage::Cuda(out), shape, BackpropOp::none(), false);
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
        let Self { op, x, stages, out, packed } = self;
        let (Some((storage, shape)), true) = (out, packed.len() <= 2) else {
            bail!("{op}: a chain has a layer, and at most two trained ones")
        };
        if residual && !matches!(stages.first(), Some(Stage { layer: Layer::Norm { .. }, .. })) {
            bail!("{op}: a chain with a residual begins with a norm")
        }
        let inputs = (&x, packed.first(), packed.get(1));
        let trained = packed.len();
        node(op, inputs, (Storage::Cuda(storage), shape), move |[x, packed @ ..], _, grad| {
            let packed = &packed[..trained];
            let residual = residual.then_some(grad);
            let (dx, [first, second]) = backward(&stages, x, packed, (grad, residual))?;
            Ok((dx.filter(|_| x.track_op()), first, second))
        })
    }
}

type Gradients = (Option<Tensor>, [Option<Tensor>; 2]);

/// The gradients of x, if it or anything before a layer wants one, and of the packed parameters. That of a residual is added
/// to the one of x by the first layer, a norm.
fn backward(
    stages: &[Stage],
    x: &Tensor,
    packed: &[&Tensor],
    (grad, residual): (&Tensor, Option<&Tensor>),
) -> Result<Gradients> {
    let (mut grad, mut of_packed) = (grad.detach(), [None, None]);
    for (index, Stage { layer, input }) in stages.iter().enumerate().rev() {
        let is_trained = |stage: &Stage| match &stage.layer {
            Layer::Projections { call, .. } => call.is_trained(),
            _ => false,
        };
        let before = x.track_op() || stages[..index].iter().any(is_trained);
        // Where nobody reads the input, the gradient stands in for it.
        let input = match (index, input) {
            (0, _) => x.detach(),
            (_, Some(input)) => input.clone(),
            (_, None) => grad.clone(),
        };
        let dx = match layer {
            _ if !before && !is_trained(&stages[index]) => return Ok((None, of_packed)),
            Layer::Norm { eps, weight, bias } => {
                let residual = residual.filter(|_| index == 0);
                super::layer_norm::backward(*eps, [&input, weight, bias], &grad, residual)?.0
            }
            Layer::Projections { call, saved, packed: at } => {
                let parameters = at.map_or(&input, |at| packed[at]);
                let (dx, dparameters) =
                    call.backward([&input, parameters], before, saved, &grad)?;
                if let Some(at) = at {
                    of_packed[*at] = dparameters;
                }
                dx
            }
            Layer::Attention { call, pad, lse, out } => {
                let pad = pad.as_ref().unwrap_or(&input);
                call.backward([&input, &input, pad], (out, lse), &grad)?.0
            }
        };
        match dx {
            Some(dx) => grad = dx,
            None => return Ok((None, of_packed)),
        }
    }
    Ok((Some(grad), of_packed))
}
