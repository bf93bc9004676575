//! PEFT-compatible LoRA: configuration, adapters, injection, merging, reports.
