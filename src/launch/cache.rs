//! A bounded cache of what is made again and again from the same description.

use candle_core::Result;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// At most two generations of `GENERATION` values, by what they are made of. When the young generation is full it becomes
/// the old one, which is forgotten; a value that is used again in time stays.
#[derive(Debug)]
pub struct Cache<K, V, const GENERATION: usize>(Mutex<[HashMap<K, V>; 2]>);

/// As many plans as an encoder's passes have, several times.
pub(super) type Plans<K> = Cache<K, std::sync::Arc<super::plan::Plan>, 256>;

impl<K, V, const GENERATION: usize> Default for Cache<K, V, GENERATION> {
    fn default() -> Self {
        Self(Mutex::new([HashMap::new(), HashMap::new()]))
    }
}

impl<K: Clone + Eq + Hash, V: Clone, const GENERATION: usize> Cache<K, V, GENERATION> {
    /// The value, made now or before.
    ///
    /// # Errors
    /// - `make` fails; nothing is kept then.
    pub fn get_or(&self, key: &K, make: impl FnOnce(&K) -> Result<V>) -> Result<V> {
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [young, old] = &mut *generations;
        if let Some(value) = young.get(key) {
            return Ok(value.clone());
        }
        let value = match old.get(key) {
            Some(value) => value.clone(),
            None => make(key)?,
        };
        if young.len() == GENERATION {
            *old = std::mem::take(young);
        }
        young.insert(key.clone(), value.clone());
        Ok(value)
    }

    /// Number of values in each generation.
    #[cfg(test)]
    pub(crate) fn len(&self) -> [usize; 2] {
        let generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        generations.each_ref().map(HashMap::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_value_is_made_once_while_it_is_in_use() -> Result<()> {
        let (cache, made) = (Cache::<u32, u32, 4>::default(), Cell::new(0));
        let get = |key| {
            cache.get_or(&key, |key| {
                made.set(made.get() + 1);
                Ok(10 * key)
            })
        };
        for other in 0..20 {
            assert_eq!((get(other)?, get(99)?), (10 * other, 990));
            assert!(cache.len().into_iter().all(|len| len <= 4), "{:?}", cache.len());
        }
        assert_eq!(made.get(), 21, "each once");
        // Unused for two generations.
        get(0)?;
        assert_eq!(made.get(), 22);
        Ok(())
    }

    #[test]
    fn a_failure_is_not_kept() -> Result<()> {
        let cache = Cache::<u32, u32, 4>::default();
        assert!(cache.get_or(&1, |_| candle_core::bail!("no")).is_err());
        assert_eq!(cache.get_or(&1, |_| Ok(2))?, 2);
        Ok(())
    }

    #[test]
    fn threads_share_one_value() {
        let (cache, made) = (Cache::<u32, u32, 4>::default(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    cache.get_or(&1, |_| Ok(made.fetch_add(1, Ordering::Relaxed) as u32))
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
