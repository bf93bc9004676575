//! Scalars for TensorBoard: an event file, which is a sequence of records.
//!
//! ```text
//! record   u64 length | masked CRC-32C of it | protobuf of an Event | masked CRC-32C of that          little-endian
//! Event    1: wall_time double   2: step int64   3: file_version string   5: Summary   7: SessionLog
//! Summary  1: Value { 1: tag string   2: simple_value float }         SessionLog  1: status (1 is START)
//! ```
//! A file opened for a continued run begins with a START at its first step. TensorBoard then forgets the events of an
//! earlier file from there on.
//!
//! Source: `record_writer.cc`, `event.proto` and `summary.proto` of TensorFlow. The one maintained-looking crate for
//! this, `tensorboard-rs`, brings an old protobuf runtime and leaves many methods unwritten.

use crate::{files, Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// An event file to which scalars are added.
///
/// [Example](crate::train::MetricsCsv)
#[derive(Debug)]
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// A new file in `folder`, which is made if need be, of a run that has made `steps` steps.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn create(folder: impl AsRef<Path>, steps: u64) -> Result<Self> {
        let folder = folder.as_ref();
        files::create_dir(folder)?;
        let seconds = now().as_secs();
        // Files are read in the order of their names.
        let mut attempt = 0;
        let (file, path) = loop {
            let name = format!("events.out.tfevents.{seconds:010}.{attempt:04}");
            let path = folder.join(name);
            match OpenOptions::new().create_new(true).write(true).open(&path) {
                Ok(file) => break (file, path),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => attempt += 1,
                Err(e) => return Err(Error::io(&path, e)),
            }
        };
        let mut events = Self { file, path };
        events.write(0, 3, b"brain.Event:2")?;
        if steps > 0 {
            events.write(steps + 1, 7, &[0x08, 1])?;
        }
        Ok(events)
    }

    /// Adds values of one step, each under its tag.
    ///
    /// # Errors
    /// When the file cannot be written to.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f32)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut scalar = Vec::new();
            push_bytes(&mut scalar, 1, tag.as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend_from_slice(&value.to_le_bytes());
            push_bytes(&mut summary, 1, &scalar);
        }
        self.write(step, 5, &summary)
    }

    /// Adds an event with one field of bytes, in one write, so that a kill damages no other.
    fn write(&mut self, step: u64, field: u8, bytes: &[u8]) -> Result<()> {
        let mut event = vec![1 << 3 | 1];
        event.extend_from_slice(&now().as_secs_f64().to_le_bytes());
        event.push(2 << 3);
        push_varint(&mut event, step);
        push_bytes(&mut event, field, bytes);
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked_crc(&length), &event, &masked_crc(&event)].concat();
        self.file.write_all(&record).map_err(|e| Error::io(&self.path, e))
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A protobuf field of bytes.
fn push_bytes(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    push_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn push_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// Rotated and shifted, because a checksum of data that holds checksums is a weak one.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}
