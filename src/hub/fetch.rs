//! From the hub into the cache, by `hf-hub`, one commit at a time. The revision's name comes last, so a name in the
//! cache means a whole commit.

use super::name::is_plain;
use crate::weights_file::{choose_weights, is_weights, Choice};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Files of a repository that are read besides weights.
const SETTINGS: [&str; 4] =
    ["config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"];
/// Tensors of adapters, the first that is there counts.
const ADAPTERS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
const LOGIN: &str = "set HF_TOKEN, or log in with `hf auth login`";

/// The commit that a revision is, as far as it is needed here.
#[derive(Deserialize)]
struct Commit {
    sha: String,
    siblings: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct RemoteFile {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
}

/// The hub's answer.
enum Answer {
    Commit(Commit),
    /// It has an answer, and that is no.
    Refusal(String),
    /// It has none now.
    Silence(String),
}

/// The folder of a revision in the cache, brought up to date if the hub can be reached.
pub(super) fn fetch(name: &str, revision: &str) -> Result<PathBuf, String> {
    if std::env::var_os("HF_HOME").is_none() && std::env::home_dir().is_none() {
        return Err("there is no home folder for the cache; set HF_HOME".into());
    }
    let cache = Cache::from_env();
    let repo = |revision: &str| {
        Repo::with_revision(name.to_string(), RepoType::Model, revision.to_string())
    };
    let here = cache.repo(repo(revision));
    let from_cache = |reason: String| {
        let why = || format!("{reason}, and the cache in {} lacks it", cache.path().display());
        cached(&here, revision).ok_or_else(why)
    };
    if offline() {
        return from_cache("HF_HUB_OFFLINE is set".into());
    }
    let mut builder = ApiBuilder::from_env();
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty()) {
        builder = builder.with_token(Some(token.trim().to_string()));
    }
    let api = builder.build().map_err(|e| e.to_string())?;
    let remote = api.repo(repo(revision));
    let commit = match ask(&remote, name, revision) {
        Answer::Commit(commit) => commit,
        Answer::Refusal(reason) => return Err(reason),
        Answer::Silence(reason) => return from_cache(reason),
    };
    let folder = here.pointer_path(&commit.sha);
    let remote = api.repo(repo(&commit.sha));
    for file in read_here(&commit.siblings)? {
        download(&remote, file, &folder).map_err(|e| format!("{}: {e}", file.name))?;
    }
    here.create_ref(&commit.sha).map_err(|e| format!("{}: {e}", cache.path().display()))?;
    Ok(folder)
}

/// The folder of a revision, if the cache has it with weights. A commit may be there without a name, by itself.
fn cached(here: &CacheRepo, revision: &str) -> Option<PathBuf> {
    // The folder itself is there under the empty name; its path ends with a slash.
    let named = here.get("").map(|folder| folder.components().collect());
    let folder = named.unwrap_or_else(|| here.pointer_path(revision));
    let files = std::fs::read_dir(&folder).ok()?;
    let mut names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    names.any(|name| is_weights(&name) || ADAPTERS.contains(&name.as_str())).then_some(folder)
}

/// Asks for the commit that a revision is.
fn ask(remote: &ApiRepo, name: &str, revision: &str) -> Answer {
    let url = remote.url("");
    let hub = url.split(&format!("/{name}/")).next().unwrap_or(&url);
    let request = remote.info_request().query("blobs", "true").config();
    let mut response = match request.http_status_as_error(false).build().call() {
        Ok(response) => response,
        Err(error) => return Answer::Silence(format!("{hub} is out of reach ({error})")),
    };
    let code = response.headers().get("x-error-code");
    match response.status().as_u16() {
        200 => {}
        404 if code.is_some_and(|code| code == "RevisionNotFound") => {
            return Answer::Refusal(format!("the repository on {hub} has no revision {revision}"))
        }
        404 => return Answer::Refusal(format!("no such repository on {hub}")),
        // The hub answers the same for a private repository and a missing one.
        401 | 403 => {
            return Answer::Refusal(format!(
                "no such repository on {hub} that this account may see; if it is private, {LOGIN}"
            ))
        }
        status => return Answer::Silence(format!("{hub} answers with HTTP status {status}")),
    }
    match response.body_mut().read_json::<Commit>() {
        // The commit becomes a path.
        Ok(commit) if is_plain(&commit.sha) => Answer::Commit(commit),
        Ok(commit) => Answer::Refusal(format!("{hub} sent {:?}, which is no commit", commit.sha)),
        Err(error) => Answer::Silence(format!("{hub} does not answer as the hub does ({error})")),
    }
}

/// The files that are read here, those with weights last.
fn read_here(files: &[RemoteFile]) -> Result<Vec<&RemoteFile>, String> {
    let names: Vec<&str> =
        files.iter().map(|file| file.name.as_str()).filter(|name| is_plain(name)).collect();
    let adapter = ADAPTERS.into_iter().find(|name| names.contains(name));
    let weights = match choose_weights(&names) {
        Choice::One(name) => Some(name),
        Choice::Several(found) if adapter.is_none() => {
            return Err(format!(
                "several files of the repository may be the weights: {}; download one and name it",
                found.join(", ")
            ))
        }
        _ => None,
    };
    if weights.or(adapter).is_none() {
        let names: Vec<&str> = files.iter().take(20).map(|file| file.name.as_str()).collect();
        return Err(format!(
            "the repository has no weights: neither safetensors nor a file of torch.save (.bin, .pth, .pt, .ckpt); \
             it has {}",
            names.join(", ")
        ));
    }
    let index = weights.filter(|name| name.ends_with(".json"));
    // The shards of an index have the ending before its own.
    let shard = index.and_then(|name| name.strip_suffix(".index.json")?.rsplit_once('.'));
    let is_shard =
        |name: &str| shard.is_some_and(|(_, ending)| is_weights(name) && name.ends_with(ending));
    let select = |wanted: &dyn Fn(&str) -> bool| -> Vec<&RemoteFile> {
        files.iter().filter(|file| is_plain(&file.name) && wanted(&file.name)).collect()
    };
    let settings = select(&|name| SETTINGS.contains(&name) || Some(name) == index);
    let whole = [weights.filter(|_| index.is_none()), adapter];
    Ok([settings, select(&|name| whole.contains(&Some(name)) || is_shard(name))].concat())
}

/// Brings a file into the commit's folder, where it is not there already.
fn download(remote: &ApiRepo, file: &RemoteFile, folder: &Path) -> Result<(), String> {
    let path = folder.join(&file.name);
    let is_whole = || path.metadata().is_ok_and(|m| file.size.is_none_or(|size| m.len() == size));
    if is_whole() {
        return Ok(());
    }
    let fetched = remote.download(&file.name).map_err(|e| explain(&e))?;
    if fetched == path && is_whole() {
        return Ok(());
    }
    // Left there, it would be taken for the file.
    let _ = std::fs::remove_file(&fetched);
    let size = file.size.map_or(String::new(), |size| format!(" of {size} bytes"));
    Err(format!("the hub sent something else than the file{size} that it announced; try again"))
}

/// The cause of a failed download.
fn explain(error: &ApiError) -> String {
    if let ApiError::RequestError(error) = error {
        if let ureq::Error::StatusCode(401 | 403) = **error {
            return format!("the repository is gated: accept its terms on its page, and {LOGIN}");
        }
    }
    format!("not fetched: {error}")
}

fn offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}
