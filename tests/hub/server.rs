//! A hub of one repository each on a port of this machine. Its addresses, status codes and headers are those of the
//! Hugging Face hub, as far as a client that reads meets them.
//!
//! ```text
//! /api/models/<name>/revision/<revision>       JSON with the commit and its files
//! /<name>/resolve/<revision>/<small file>      307 to an address on the same host, which has the bytes
//! /<name>/resolve/<revision>/<large file>      302 with x-linked-etag to an address that has the bytes
//! ```

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const TOKEN: &str = "hf_secret";

/// A repository, and the state of the hub that has it.
#[derive(Clone, Default)]
pub struct Hub {
    pub name: String,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Shown to nobody without the token.
    pub private: bool,
    /// Shown to everybody, but files only to who has the token.
    pub gated: bool,
    /// The connection breaks in the middle of a large file.
    pub truncating: bool,
    /// Large files have another length than was announced.
    pub lying: bool,
    /// Not well.
    pub down: bool,
    /// In the place of the commit.
    pub commit: Option<String>,
}

/// A hub that answers until the process ends, and what it was asked for.
pub struct Running {
    pub address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Running {
    /// The addresses since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Hub {
    pub fn run(self) -> Result<Running> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("http://{}", listener.local_addr()?);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, base) = (requests.clone(), address.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is no fault of the hub.
                let _ = self.answer(stream, &base, &log);
            }
        });
        Ok(Running { address, requests })
    }

    fn answer(&self, mut stream: TcpStream, base: &str, log: &Mutex<Vec<String>>) -> Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().context("no request")??;
        let path = first.split(' ').nth(1).context("no address")?.to_string();
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_lowercase(), value.trim().to_string());
        }
        log.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        let known = headers.get("authorization") == Some(&format!("Bearer {TOKEN}"));
        let path = path.split('?').next().unwrap_or_default();
        let range = headers.get("range").map(String::as_str);
        let (status, head, body) = self.response(path, range, known, base);
        let cut = self.truncating && body.len() > 1 && path.starts_with("/large/");
        let sent = if cut { body.len() / 2 } else { body.len() };
        write!(
            stream,
            "HTTP/1.1 {status} -\r\nConnection: close\r\nContent-Length: {}\r\n{head}\r\n",
            body.len()
        )?;
        stream.write_all(&body[..sent])?;
        Ok(())
    }

    /// Status, headers and body.
    fn response(
        &self,
        path: &str,
        range: Option<&str>,
        known: bool,
        base: &str,
    ) -> (u16, String, Vec<u8>) {
        let refusal = |status, code: &str| (status, format!("X-Error-Code: {code}\r\n"), vec![]);
        let commit = self.commit.as_deref().unwrap_or(COMMIT);
        if self.down {
            return (503, String::new(), vec![]);
        }
        for place in ["/small/", "/large/"] {
            if let Some(body) = path.strip_prefix(place).and_then(|file| self.files.get(file)) {
                let etag = format!("ETag: \"{}\"\r\nX-Repo-Commit: {commit}\r\n", etag(path));
                let lie = usize::from(self.lying && place == "/large/");
                return part(&body[lie..], range, etag);
            }
        }
        let api = format!("/api/models/{}/revision/", self.name);
        let resolve = format!("/{}/resolve/", self.name);
        if let Some(revision) = path.strip_prefix(&api) {
            if self.private && !known {
                return refusal(401, "RepoNotFound");
            }
            if !["main", "v1.0", commit].contains(&revision) {
                return refusal(404, "RevisionNotFound");
            }
            let siblings = self.files.iter().map(|(name, body)| {
                serde_json::json!({ "rfilename": name, "size": body.len(), "blobId": etag(name) })
            });
            let siblings: Vec<_> = siblings.collect();
            let body = serde_json::json!({ "id": self.name, "sha": commit, "siblings": siblings });
            return (200, "Content-Type: application/json\r\n".into(), body.to_string().into());
        }
        match path
            .strip_prefix(&resolve)
            .and_then(|rest| rest.strip_prefix(commit)?.strip_prefix('/'))
        {
            Some(_) if (self.gated || self.private) && !known => refusal(403, "GatedRepo"),
            Some(file) if !self.files.contains_key(file) => refusal(404, "EntryNotFound"),
            Some(file) if file.ends_with(".safetensors") => {
                let linked =
                    format!("X-Linked-ETag: \"{}\"\r\nX-Repo-Commit: {commit}\r\n", etag(file));
                (302, format!("{linked}Location: {base}/large/{file}\r\n"), vec![])
            }
            Some(file) => (307, format!("Location: /small/{file}\r\n"), vec![]),
            None => refusal(404, "RepoNotFound"),
        }
    }
}

/// A name for content that no other file has.
fn etag(path: &str) -> String {
    path.bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// All of a body or the range `bytes=a-` or `bytes=a-b` of it.
fn part(body: &[u8], range: Option<&str>, head: String) -> (u16, String, Vec<u8>) {
    let bounds = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let Some((start, end)) = bounds else { return (200, head, body.to_vec()) };
    let end = end.parse().map_or(body.len(), |end: usize| (end + 1).min(body.len()));
    let start = start.parse().unwrap_or(0).min(end);
    let range = format!("Content-Range: bytes {start}-{}/{}\r\n", end.max(1) - 1, body.len());
    (206, head + &range, body[start..end].to_vec())
}
