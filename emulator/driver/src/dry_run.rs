//! The dry run: the driver counts what it is asked for and does not do it. So a model of any size shows in seconds what
//! it launches and how much memory it takes. Nobody touches the memory; what the host copies back is zero.

use std::sync::OnceLock;

/// Whether `EMULATED_DRY_RUN` in the environment asks for it.
pub fn is_on() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("EMULATED_DRY_RUN").is_some())
}

/// [`is_on`], for tests.
#[no_mangle]
pub extern "C" fn emulated_driver_is_dry() -> bool {
    is_on()
}
