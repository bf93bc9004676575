//! A model or an adapter by its name: a folder here, or `owner/name` on the Hugging Face hub.
//!
//! With the feature `hub`, [`folder`] asks the hub for the commit of a revision and for its files. It fetches
//! configurations and weights (safetensors, or else the one file of `torch.save`) into the cache that Python's
//! libraries use too. It returns the commit's folder in that cache. Where the hub is out of reach, the commit that was
//! fetched last serves.
//!
//! | environment | meaning |
//! |---|---|
//! | `HF_HOME` | the cache is `$HF_HOME/hub`; by default `~/.cache/huggingface/hub` |
//! | `HF_TOKEN` | for private and gated repositories; by default what `hf auth login` has left in `$HF_HOME/token` |
//! | `HF_ENDPOINT` | another hub than `https://huggingface.co` |
//! | `HF_HUB_OFFLINE` | `1`: the cache alone, no network |
//!
//! ```
//! use candle_sam_lora::hub;
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! assert!(hub::folder("assets/tiny-sam")?.join("config.json").exists());
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "hub")]
mod fetch;
mod name;

use crate::weights_file::split_prefix;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The folder of the model or adapter `name`: `name` itself, if there is such a path, else `owner/name` or
/// `owner/name@revision` on the hub. A revision is a branch, a tag or a commit, by default `main`. A `#prefix` behind
/// either names one of several models in its file, and stays.
///
/// [Example](crate::hub)
///
/// # Errors
/// [`Error::Hub`] if there is no such folder, and
/// - the name is none of the hub's, or the feature `hub` is off;
/// - the hub has no such repository or revision, refuses access, or has no weights there;
/// - the network fails and the cache has nothing.
pub fn folder(name: impl AsRef<Path>) -> Result<PathBuf> {
    let (path, prefix) = split_prefix(name.as_ref());
    if path.exists() {
        return Ok(name.as_ref().to_path_buf());
    }
    let found = match path.to_str().and_then(name::parse) {
        Some((repository, revision)) => fetch(repository, revision),
        None => Err("a name on the Hugging Face hub is owner/name or owner/name@revision".into()),
    };
    let found =
        found.map_err(|message| Error::Hub { name: path.display().to_string(), message })?;
    let Some(prefix) = prefix else { return Ok(found) };
    let mut found = found.into_os_string();
    found.push(format!("#{prefix}"));
    Ok(found.into())
}

#[cfg(feature = "hub")]
use fetch::fetch;

#[cfg(not(feature = "hub"))]
fn fetch(_: &str, _: &str) -> std::result::Result<PathBuf, String> {
    Err("to fetch it from the Hugging Face hub, build with --features hub".into())
}

#[cfg(test)]
mod tests {
    use super::folder;

    #[test]
    fn what_is_there_wins_and_what_is_not_is_told() -> crate::Result<()> {
        assert_eq!(folder("src/hub")?, std::path::Path::new("src/hub"));
        let message = folder("../nowhere").map(drop).map_err(|e| e.to_string());
        let expected =
            "../nowhere: no such file or folder here; a name on the Hugging Face hub is owner/name or \
                        owner/name@revision";
        assert_eq!(message, Err(expected.to_string()));
        if cfg!(not(feature = "hub")) {
            let message = folder("facebook/sam-vit-base").map(drop).map_err(|e| e.to_string());
            assert!(message.is_err_and(|message| message.contains("--features hub")));
        }
        Ok(())
    }
}
