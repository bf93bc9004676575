//! Which families of native kernels have been tested on which device, and what computes their problems since.
//!
//! The test is in `ops`, above this layer: it runs the operations.

use crate::launch::family::Family;
use crate::launch::self_test::Choice;
use candle_core::DType;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

static ON: AtomicBool = AtomicBool::new(true);

/// Whether native kernels are tested before their first use, in the whole process; they are, unless told otherwise. A
/// family that was refused stays refused, and one whose use began untested is tested at its next use once tests are on.
///
/// [Example](crate::cuda)
pub fn self_test(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// Whether native kernels are tested before their first use.
pub(crate) fn self_test_is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// A family and dtype, tested and trusted as one.
pub(crate) type Key = (Family, DType);

/// The choice for each family that was tested in a context.
#[derive(Default)]
pub(super) struct Tested(Mutex<HashMap<Key, Choice>>);

impl Tested {
    fn with<R>(&self, f: impl FnOnce(&mut HashMap<Key, Choice>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The result for a key; none if it was never tested.
    pub fn get(&self, key: Key) -> Option<Choice> {
        self.with(|tested| tested.get(&key).copied())
    }

    /// Keeps what a test found, and whether that is news. Kernels that were refused once are not taken again.
    pub fn keep(&self, key: Key, found: Choice) -> (Choice, bool) {
        self.with(|tested| {
            let before = tested.get(&key).copied();
            let choice = before.map_or(found, |before| before.max(found));
            tested.insert(key, choice);
            (choice, before != Some(choice))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_on_until_switched_off() {
        assert!(self_test_is_on());
        self_test(false);
        assert!(!self_test_is_on());
        self_test(true);
        assert!(self_test_is_on());
    }
    #[test]
    fn a_family_that_was_refused_stays_refused() {
        let tested = Tested::default();
        let key = (Family::Projection, DType::F16);
        assert_eq!(tested.keep(key, Choice::Native), (Choice::Native, true));
        assert_eq!(tested.keep(key, Choice::Native), (Choice::Native, false));
        assert_eq!(tested.keep(key, Choice::Portable), (Choice::Portable, true));
        assert_eq!(tested.keep(key, Choice::Native), (Choice::Portable, false));
        assert_eq!(tested.keep(key, Choice::Composed), (Choice::Composed, true));
        // Each dtype has instances of its own.
        let other = (Family::Projection, DType::BF16);
        assert_eq!(tested.keep(other, Choice::Native), (Choice::Native, true));
    }
}
