//! A program sees by events of `tracing` when an operation runs as a graph of candle's operations.

use crate::common::random;
use candle_core::{Result, Var};
use candle_sam_lora::ops::{lora_linear, Activation, Projection};
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Keeps the fields of events with the target that docs/link.md names.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

impl Subscriber for Seen {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "candle_sam_lora::composed"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// In a process of its own. Where a thread without a subscriber meets an event first, `tracing` may take it for
/// unwanted everywhere. It asks that thread's subscriber alone, as long as there is one in all.
#[test]
fn composed_graphs_are_told() -> Result<()> {
    let test = "composed_events::a_trained_weight_is_told_and_a_frozen_one_is_not";
    let mut command = std::process::Command::new(std::env::current_exe()?);
    let output = command.args(["--exact", test, "--ignored"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    Ok(())
}

#[test]
#[ignore = "wants a process of its own: composed_graphs_are_told"]
fn a_trained_weight_is_told_and_a_frozen_one_is_not() -> Result<()> {
    let (x, weight) = (random(1, &[3, 4]), Var::from_tensor(&random(2, &[5, 4]))?);
    let seen = Seen::default();
    tracing::subscriber::with_default(seen.clone(), || {
        for weight in [&weight.detach(), weight.as_tensor()] {
            let projection = Projection { weight, scales: None, bias: None, lora: None };
            lora_linear(&x, &projection, Activation::Identity, None)?;
        }
        Result::Ok(())
    })?;
    let events = seen.0.lock().unwrap();
    let [event] = events.as_slice() else { panic!("{events:?}") };
    let expected =
        ["op=\"lora-linear\"", "a base weight is trained", "dtype=\"f32\"", "shape=[3, 4]"];
    for part in expected {
        assert!(event.contains(part), "{event}\nlacks {part}");
    }
    Ok(())
}
