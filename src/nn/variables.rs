//! The variable behind a parameter: itself, or the variable it is a view of.
//!
//! candle's `is_variable` is false for a view of a variable, such as the rows of a fused `qkv` that are q. Yet a view
//! takes part in the graph, and shows every value that its variable is set to. A tensor computed from a variable (a
//! cast, a copy, a sum) takes part in the graph too, but keeps its own values.

use crate::{Error, Result};
use candle_core::{Tensor, Var};

/// Names operations that end the graph without an error, for messages on missing gradients.
pub(crate) const ENDS_THE_GRAPH: &str =
    "candle_nn's LayerNorm, RmsNorm, softmax_last_dim, rotary embeddings and any apply_op*_no_bwd have no backward \
     and end the graph without an error; nn::LayerNorm and candle_nn::ops::softmax have one";

/// A parameter's part in training.
pub(crate) enum Training {
    /// A constant.
    Frozen,
    /// The parameter itself, or the variable it is a view of.
    Trained(Var),
    /// Computed from variables: a step changes them, but not this tensor.
    Computed,
}

impl Training {
    pub(crate) fn of(tensor: &Tensor) -> Result<Self> {
        if !tensor.track_op() {
            return Ok(Self::Frozen);
        }
        let nodes = tensor.sorted_nodes();
        let mut variables = nodes.into_iter().filter(|node| node.is_variable());
        match (variables.next(), variables.next()) {
            (Some(variable), None) if storage(variable) == storage(tensor) => {
                Ok(Self::Trained(Var::from_tensor(variable)?))
            }
            _ => Ok(Self::Computed),
        }
    }

    /// The variable that a step changes, if the parameter called `name` is trained.
    ///
    /// # Errors
    /// When the parameter is computed from a variable.
    pub(crate) fn variable(name: &str, tensor: &Tensor) -> Result<Option<Var>> {
        match Self::of(tensor)? {
            Self::Frozen => Ok(None),
            Self::Trained(variable) => Ok(Some(variable)),
            Self::Computed => Err(Error::config(format!(
                "{name} is computed from a variable (by a cast, a copy or arithmetic) and would keep its values when \
                 the variable changes; nn::set_trainable makes it a variable of its own, or freezes it"
            ))),
        }
    }
}

/// Identifies the memory that a tensor lies in.
fn storage(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref(&*storage).addr()
}

/// Fails where [`set_values`] would.
pub(crate) fn check_settable(name: &str, tensor: &Tensor) -> Result<()> {
    let repeats =
        || tensor.dims().iter().zip(tensor.stride()).any(|(&n, &step)| n > 1 && step == 0);
    match Training::variable(name, tensor)? {
        Some(_) if repeats() => Err(Error::config(format!(
            "{name} is a broadcast view of a variable: its elements share memory and cannot be set one by one"
        ))),
        _ => Ok(()),
    }
}

/// Gives a tensor other values of its shape, dtype and device. A variable, and the variable of a view, get them in
/// place; a constant is replaced.
///
/// # Errors
/// As [`check_settable`].
pub(crate) fn set_values(name: &str, tensor: &mut Tensor, values: &Tensor) -> Result<()> {
    check_settable(name, tensor)?;
    if !tensor.track_op() {
        *tensor = values.detach();
        return Ok(());
    }
    let values = match storage(tensor) == storage(values) {
        true => values.detach().copy()?,
        false => values.detach(),
    };
    Ok(set_view(&tensor.detach(), &values)?)
}

/// Writes into the memory that a view of any strides shows.
fn set_view(view: &Tensor, values: &Tensor) -> candle_core::Result<()> {
    if view.is_contiguous() {
        return view.flatten_all()?.slice_set(&values.flatten_all()?.contiguous()?, 0, 0);
    }
    // The longest stride first, so that what a transposed view shows is contiguous.
    let mut axes: Vec<usize> = (0..view.rank()).collect();
    axes.sort_by_key(|&axis| std::cmp::Reverse(view.stride()[axis]));
    let (view, values) = (view.permute(axes.as_slice())?, values.permute(axes.as_slice())?);
    if view.is_contiguous() {
        return set_view(&view, &values);
    }
    // Not `get`, which copies a tensor that is not contiguous.
    let row = |tensor: &Tensor, i: usize| tensor.narrow(0, i, 1)?.squeeze(0);
    (0..view.dim(0)?).try_for_each(|i| set_view(&row(&view, i)?, &row(&values, i)?))
}
