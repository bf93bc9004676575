//! Which random cases a property is tried on: the same ones in every run, so that what passed once passes again.
//! `PROPTEST_RNG_SEED` in the environment chooses others, `PROPTEST_CASES` their number.

use proptest::test_runner::{Config, RngSeed};

/// `cases` cases, unless the environment says otherwise.
pub fn config(cases: u32) -> Config {
    let asked = Config::default();
    let rng_seed = match asked.rng_seed {
        RngSeed::Random => RngSeed::Fixed(0),
        fixed => fixed,
    };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { cases };
    Config { cases, rng_seed, failure_persistence: None, ..asked }
}
