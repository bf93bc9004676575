//! Gradients of parameters, past candle's store.
//!
//! candle's backward fills a tensor with zeros and adds to it, for every gradient of every input of an operation.
//! Operations of the GPU hand the gradients of an open collector's parameters to it instead, as views of what their
//! kernels wrote. An operation asks for the collector in its forward, and keeps it for its backward.

use crate::launch::cache::{QuickMap, QuickSet};
use candle_core::{DType, Result, Tensor, TensorId};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

thread_local! {
    /// The innermost last; none where it is closed.
    static OPEN: RefCell<Vec<Option<Arc<Collector>>>> = const { RefCell::new(vec![]) };
}

/// Gradients of some parameters, in the making.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    parameters: QuickSet<TensorId>,
    found: Mutex<QuickMap<TensorId, Tensor>>,
}

/// Closes a collector again, however its work ends.
struct Closing;

impl Drop for Closing {
    fn drop(&mut self) {
        OPEN.with_borrow_mut(Vec::pop);
    }
}

impl Collector {
    /// A collector for the gradients of these variables.
    pub fn of<'a>(parameters: impl Iterator<Item = &'a Tensor>) -> Arc<Self> {
        let parameters = parameters.map(Tensor::id).collect();
        Arc::new(Self { parameters, found: Mutex::default() })
    }

    /// Does work whose operations hand over their gradients.
    pub fn during<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        scoped(Some(self.clone()), work)
    }

    /// The innermost one on this thread.
    pub fn open() -> Option<Arc<Self>> {
        OPEN.with_borrow(|open| open.last().cloned().flatten())
    }

    /// Whether it takes gradients of this tensor: a variable of its own, in f32, so that nothing is rounded on the way.
    pub fn takes(&self, tensor: &Tensor) -> bool {
        tensor.dtype() == DType::F32 && self.parameters.contains(&tensor.id())
    }

    /// Adds a gradient.
    pub fn add(&self, parameter: &Tensor, gradient: Tensor) -> Result<()> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = match found.remove(&parameter.id()) {
            Some(before) => (before + gradient)?,
            None => gradient,
        };
        found.insert(parameter.id(), sum);
        Ok(())
    }

    /// The parameter's gradient so far, and what `others`, candle's store, has of it.
    pub fn total(&self, parameter: &Tensor, others: Option<&Tensor>) -> Result<Option<Tensor>> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        match (found.get(&parameter.id()), others) {
            (Some(own), Some(others)) => (own + others).map(Some),
            (own, others) => Ok(own.or(others).cloned()),
        }
    }
}

/// Does work while no collector is open.
pub(crate) fn without_collector<T>(work: impl FnOnce() -> T) -> T {
    scoped(None, work)
}

fn scoped<T>(collector: Option<Arc<Collector>>, work: impl FnOnce() -> T) -> T {
    OPEN.with_borrow_mut(|open| open.push(collector));
    let _closing = Closing;
    work()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn gradients_add_up_with_those_of_the_store() -> Result<()> {
        let var = |x: f32| Var::new(&[x], &Device::Cpu);
        let (known, stranger) = (var(1.0)?, var(2.0)?);
        let collector = Collector::of([known.as_tensor()].into_iter());
        assert!(collector.takes(&known) && !collector.takes(&stranger));
        let total = |others: Option<&Tensor>| -> Result<Option<Vec<f32>>> {
            collector.total(&known, others)?.map(|total| total.to_vec1()).transpose()
        };
        assert_eq!(total(None)?, None);
        assert_eq!(total(Some(&stranger))?, Some(vec![2.0]));
        for expected in [3.0, 6.0] {
            collector.add(&known, Tensor::new(&[3f32], &Device::Cpu)?)?;
            assert_eq!(total(None)?, Some(vec![expected]));
        }
        assert_eq!(total(Some(&stranger))?, Some(vec![8.0]));
        Ok(())
    }

    #[test]
    fn a_collector_is_open_during_its_work_alone() {
        let (outer, inner) = (Collector::of([].into_iter()), Collector::of([].into_iter()));
        let is = |expected: &Arc<Collector>| {
            Collector::open().is_some_and(|c| Arc::ptr_eq(&c, expected))
        };
        outer.during(|| {
            assert!(is(&outer));
            inner.during(|| assert!(is(&inner)));
            without_collector(|| assert!(Collector::open().is_none()));
            let failed = std::panic::catch_unwind(|| without_collector(|| panic!("on purpose")));
            assert!(failed.is_err() && is(&outer));
        });
        assert!(Collector::open().is_none());
    }
}
